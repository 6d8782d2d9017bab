"""The PGD of training and evaluation, whose random start is drawn for its purpose alone."""

import functools
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_kernels import PGD
from rter.distributed import Share


class Perturbation(Protocol):
    """What a run's settings and an evaluation's strength say of a perturbation."""

    @property
    def norm(self) -> str: ...

    @property
    def alpha_ratio(self) -> float: ...

    def seed_for(self, *purpose: str | int) -> int: ...


def make_attack(
    model: nn.Module,
    perturbation: Perturbation,
    eps: float | Tensor,
    steps: int,
    *purpose: str | int,
    alpha_ratio: float | None = None,
    share: Share | None = None,
    **options: Any,
) -> PGD:
    """PGD, on the cross-entropy unless `options` say otherwise; its random start is drawn for `purpose` alone, and for
    the joint batch of a share."""
    alpha = (perturbation.alpha_ratio if alpha_ratio is None else alpha_ratio) * eps
    pgd = PGD if share is None or share.alone else functools.partial(SharedPGD, share)
    return pgd(model, eps, alpha, steps, norm=perturbation.norm, seed=perturbation.seed_for(*purpose), **options)


class SharedPGD(PGD):
    """PGD on a share of a joint batch, from the starts that it has there."""

    def __init__(self, share: Share, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.share = share

    def start(self, x: Tensor, eps: Tensor, generator: torch.Generator) -> Tensor:
        rows, ours = self.share.joint_rows(len(x))
        joint_x, joint_eps = x.new_zeros(rows, *x.shape[1:]), eps.new_zeros(rows)
        joint_x[ours], joint_eps[ours] = x, eps
        return super().start(joint_x, joint_eps, generator)[ours]
