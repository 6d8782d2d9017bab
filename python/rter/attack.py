"""The PGD of training and evaluation; its random start depends on the seed and on what it is for, nothing else."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_kernels import PGD
from rter.distributed import Share


class Perturbation(Protocol):
    """What a run's settings and an evaluation's strength have in common."""

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
    **options: Any,
) -> PGD:
    """PGD on the cross-entropy, or what `options` say; each `purpose` has a seed of its own for the random start."""
    alpha = (perturbation.alpha_ratio if alpha_ratio is None else alpha_ratio) * eps
    seed = perturbation.seed_for(*purpose)
    return TrainingPGD(model, eps, alpha, steps, norm=perturbation.norm, seed=seed, **options)


class TrainingPGD(PGD):
    """PGD with the starts that training needs.

    Args:
        share: the part of a joint batch that is attacked, with the same starts as in the joint batch; None for all.
        start_ratio: radius in which the start is drawn, relative to that of the ball.
        prior: perturbations to start from instead, if they have the shape of x.
    """

    def __init__(
        self,
        *args: Any,
        share: Share | None = None,
        start_ratio: float = 1.0,
        prior: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.share, self.start_ratio, self.prior = share, start_ratio, prior

    def start(self, x: Tensor, eps: Tensor, generator: torch.Generator) -> Tensor:
        if self.prior is not None and self.prior.shape == x.shape:
            return self._projected(x + self.prior, x, eps)
        eps = eps * self.start_ratio
        if self.share is None or self.share.alone:
            return super().start(x, eps, generator)
        rows, ours = self.share.joint_rows(len(x))
        joint_x, joint_eps = x.new_zeros(rows, *x.shape[1:]), eps.new_zeros(rows)
        joint_x[ours], joint_eps[ours] = x, eps
        return super().start(joint_x, joint_eps, generator)[ours]
