"""Attacks on any torch model: PGD, APGD, and the mode in which a model is attacked."""

from moe_kernels.attacks.apgd import APGD
from moe_kernels.attacks.attack_mode import attack_mode
from moe_kernels.attacks.pgd import PGD

__all__ = ["APGD", "PGD", "attack_mode"]
