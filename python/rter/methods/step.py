"""What the methods share in one training step: the attack, the exploring route and the balance loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe_kernels import Routing
from moe_kernels.attacks import PGD
from rter.models import RobustClassifier, View

if TYPE_CHECKING:
    from rter.config import Config  # which imports the methods


@dataclass(frozen=True)
class Step:
    """Training step number `index`; all its draws follow from the run's seed and that number."""

    model: RobustClassifier
    config: Config
    index: int
    exploring: bool

    def attack(self, model: nn.Module) -> PGD:
        """The training attack: its last iterate, as in the papers, which also spares a forward."""
        config = self.config
        return make_attack(model, config, config.eps, config.attack_steps, "attack", self.index, best_iterate=False)

    def own_route(self, x: Tensor) -> Routing | None:
        """While exploring, each image's first or second expert at random; afterwards None: the model routes."""
        if not self.exploring or self.model.num_experts == 1:
            return None
        generator = torch.Generator().manual_seed(self.config.seed_for("explore", self.index))
        rank = torch.randint(2, (len(x),), generator=generator)
        return self.model.route(x, top_k=2).select(rank)

    def balance(self, x: Tensor) -> Tensor:
        return self.config.balance_weight * self.model.route(x).balance_loss()


def make_attack(
    model: nn.Module, config: Config, eps: float, steps: int, *purpose: str | int, best_iterate: bool = True
) -> PGD:
    """PGD on the cross-entropy, its random start drawn for `purpose` alone."""
    alpha, seed = config.alpha_ratio * eps, config.seed_for(*purpose)
    return PGD(model, eps, alpha, steps, norm=config.norm, seed=seed, best_iterate=best_iterate)


def partly_forced(model: RobustClassifier, own: Routing | None, forced: Routing) -> View:
    """The model with the last rows of the batch sent along `forced`, the rows before them along `own` or, if that is
    None, along the model's own route, which an attack can then change."""

    def logits(model: RobustClassifier, x: Tensor) -> Tensor:
        first = model.route(x[: len(x) - len(forced.experts)]) if own is None else own
        return model(x, routing=Routing.cat([first, forced]))

    return View(model, logits)
