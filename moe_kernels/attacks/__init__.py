"""Attacks on any torch model, attacks on mixtures of experts, and the mode in which a model is attacked."""

from moe_kernels.attacks.adaptive import ExpertAttack, JointAttack, RouterLogits, SoftBackward, every_expert
from moe_kernels.attacks.apgd import APGD
from moe_kernels.attacks.attack_mode import attack_mode
from moe_kernels.attacks.pgd import PGD

__all__ = ["APGD", "PGD", "ExpertAttack", "JointAttack", "RouterLogits", "SoftBackward", "attack_mode", "every_expert"]
