"""What the methods share in one training step: the attack, the exploring route and the balance loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_kernels import Routing
from moe_kernels.attacks import PGD
from rter.models import DualClassifier, RobustClassifier, View

if TYPE_CHECKING:
    from rter.config import Config  # which imports the methods


@dataclass(frozen=True)
class Step:
    """Training step number `index`; all its draws follow from the run's seed and that number."""

    model: RobustClassifier
    config: Config
    index: int
    epoch: int = field(kw_only=True)

    @property
    def exploring(self) -> bool:
        return self.epoch < self.config.explore * self.config.epochs

    @property
    def awp_gamma(self) -> float:
        return self.config.awp_gamma if self.epoch >= self.config.awp_warmup else 0.0

    @property
    def dual(self) -> DualClassifier:
        assert isinstance(self.model, DualClassifier)
        return self.model

    def attack(
        self, model: nn.Module, *, eps: float | Tensor | None = None, steps: int | None = None, **options: Any
    ) -> PGD:
        """The training attack: its last iterate, as in the papers, which also spares a forward."""
        eps = self.config.eps if eps is None else eps
        steps = self.config.attack_steps if steps is None else steps
        return make_attack(model, self.config, eps, steps, "attack", self.index, best_iterate=False, **options)

    def own_route(self, x: Tensor) -> Routing | None:
        """While exploring, each image's first or second expert at random; afterwards None: the model routes."""
        if not self.exploring or self.model.num_experts == 1 or self.config.gate == "soft":
            return None
        generator = torch.Generator().manual_seed(self.config.seed_for("explore", self.index))
        rank = torch.randint(2, (len(x),), generator=generator)
        return self.model.route(x, top_k=2).select(rank)

    def balance(self, x: Tensor) -> dict[str, Tensor]:
        """The balance loss; nothing where its weight is 0, so that it does not give the router a gradient of zeros."""
        weight = self.config.balance_weight
        return {"balance": weight * self.model.route(x).balance_loss()} if weight else {}


def make_attack(
    model: nn.Module,
    config: Config,
    eps: float | Tensor,
    steps: int,
    *purpose: str | int,
    alpha_ratio: float | None = None,
    **options: Any,
) -> PGD:
    """PGD, on the cross-entropy unless `options` say otherwise; its random start is drawn for `purpose` alone."""
    alpha = (config.alpha_ratio if alpha_ratio is None else alpha_ratio) * eps
    return PGD(model, eps, alpha, steps, norm=config.norm, seed=config.seed_for(*purpose), **options)


def partly_forced(model: RobustClassifier, own: Routing | None, forced: Routing) -> View:
    """The model with the last rows of the batch sent along `forced`, the rows before them along `own` or, if that is
    None, along the model's own route, which an attack can then change."""

    def logits(model: RobustClassifier, x: Tensor) -> Tensor:
        first = model.route(x[: len(x) - len(forced.experts)]) if own is None else own
        return model(x, routing=Routing.cat([first, forced]))

    return View(model, logits)
