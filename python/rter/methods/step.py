"""What all methods share in a training step: the attack, the exploring route and the losses of the router."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import RouterLogits, Routing
from rter.attack import make_attack
from rter.config import Config
from rter.distributed import Share
from rter.methods.awp import kept_buffers
from rter.models.classifier import DualClassifier, RobustClassifier, View
from rter.train_attacks import SINGLE_STEPS


@dataclass(frozen=True)
class Step:
    """Training step number `index`; all its random draws are determined by the run's seed and that number.

    Args:
        share: the part of the joint batch that this process computes; None for all of it.
        found: what the attacks of this step have returned.
        priors: the perturbations from which the next step's attacks start, by the attack's purpose.
        terms: the terms of the loss computed so far, detached.
        clean: the input of experts and router of the batch's clean images, once it has been computed for this model.
    """

    model: RobustClassifier
    config: Config
    index: int
    epoch: int = field(kw_only=True)
    share: Share | None = None
    found: list[Tensor] = field(default_factory=list)
    priors: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)
    clean: list[Tensor] = field(default_factory=list, init=False)

    @property
    def exploring(self) -> bool:
        return self.config.exploring(self.epoch)

    @property
    def awp_gamma(self) -> float:
        return self.config.awp_gamma if self.epoch >= self.config.awp_warmup else 0.0

    @property
    def dual(self) -> DualClassifier:
        assert isinstance(self.model, DualClassifier)
        return self.model

    def arithmetic(self) -> torch.autocast:
        """The precision of the method's forwards and of its attacks."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.amp == "bf16")

    def attack(
        self,
        model: nn.Module,
        purpose: str = "attack",
        *,
        eps: float | Tensor | None = None,
        steps: int | None = None,
        **options: Any,
    ) -> Callable[..., Tensor]:
        """The run's training attack or, if `steps` are given, PGD with so many steps.

        It returns the last iterate, as in the papers, which also saves a forward. Each `purpose` has its own start.
        """
        eps = self.config.eps if eps is None else eps
        single = SINGLE_STEPS.get(self.config.train_attack) if steps is None else None
        options |= {"best_iterate": False, **({"share": self.share} if self.share else {})}
        if single:
            steps, eps = 1, single.radius * eps
            options |= {"alpha_ratio": single.step / single.radius, "start_ratio": single.start / single.radius}
            options |= {"random_start": True, "prior": self.priors.get(purpose)}
        steps = self.config.attack_steps if steps is None else steps
        attack = make_attack(model, self.config, eps, steps, purpose, self.index, **options)

        def remembered(x: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
            self.found.append(attack(x, y, **kwargs))
            if single and single.keeps:
                self.priors[purpose] = self.found[-1] - x
            return self.found[-1]

        return remembered

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean cross-entropy of a batch, with the run's label smoothing."""
        return F.cross_entropy(logits, y, label_smoothing=self.config.label_smoothing)

    def own_route(self, x: Tensor) -> Routing | None:
        """While exploring, a route to each image's first or second expert at random, and while upcycling to the one
        expert; then None: the model routes."""
        early = self.exploring or self.config.upcycling(self.epoch)
        if not early or self.model.num_experts == 1 or self.config.gate == "soft":
            return None
        return self.ranked_route(x, range(2), "explore")

    def ranked_route(self, x: Tensor, ranks: range, purpose: str) -> Routing:
        """Each image's route to the expert of a rank drawn from `ranks`, of which 0 is its first; while upcycling, to
        the one expert."""
        if self.config.upcycling(self.epoch):
            return self.clean_route(x).fixed(0)
        generator = torch.Generator().manual_seed(self.config.seed_for(purpose, self.index))
        rows, ours = (self.share or Share.whole(len(x))).joint_rows(len(x))
        rank = torch.randint(ranks.start, ranks.stop, (rows,), generator=generator)[ours].to(x.device)
        return self.clean_route(x, ranks.stop).select(rank)

    def clean_route(self, x: Tensor, top_k: int | None = None) -> Routing:
        """The model's route of the batch's clean images, which moves no statistics of batch norm."""
        with kept_buffers(self.model.moe.router):
            return self.model.moe.route(self.clean_features(x), top_k)

    def clean_features(self, x: Tensor) -> Tensor:
        """The input of experts and router of the batch's clean images, without a gradient: computed once in a step,
        with the weights that it begins with, and without moving statistics."""
        if not self.clean:
            with torch.no_grad(), kept_buffers(self.model.trunk or self.model.normalize):
                self.clean.append(self.model.features(x))
        return self.clean[0]

    def routing(self, x: Tensor) -> Callable[[], dict[str, Tensor]]:
        """The losses of the router as a function of the weights: the balance and, with a `route_weight`, the route's.

        route: CE(r(x_r), argmax r(x)), where x_r is the training attack on that cross-entropy. It is small only if the
        choice leads by a margin even under attack; the balance loss keeps the choice from being the same for all.
        """
        if not self.config.route_weight or self.model.num_experts == 1:
            return lambda: self.balance(x)
        chosen = self.clean_route(x).experts[:, 0].long()
        x_r = self.attack(RouterLogits(self.model), "route")(x, chosen)

        def loss() -> dict[str, Tensor]:
            kept = F.cross_entropy(self.model.route(x_r).logits, chosen)
            return {**self.balance(x), "route": self.config.route_weight * kept}

        return loss

    def balance(self, x: Tensor) -> dict[str, Tensor]:
        """The balance loss; no term if its weight is 0, so that the router gets no gradient rather than zeros.

        Its gradient reaches the router alone, and not stages that experts share.
        With the load of the joint batch it is a mean over rows, like every other term.
        """
        if not self.config.balance_weight:
            return {}
        routing = self.model.moe.route(self.clean_features(x))
        load = routing.load
        if self.share:
            self.share.mean_([load])
        return {"balance": self.config.balance_weight * routing.balance_loss(load)}


def partly_forced(model: RobustClassifier, own: Routing | None, forced: Routing) -> View:
    """The model with the last rows of the batch sent along `forced`, the rows before them along `own` or, if that is
    None, along the model's own route, which an attack can then change."""

    fixed = None if own is None else Routing.cat([own, forced])  # sorted and exchanged once

    def logits(model: RobustClassifier, x: Tensor) -> Tensor:
        own_rows = slice(len(x) - len(forced.experts))
        return model(x, routing=fixed or (lambda h: Routing.cat([model.moe.route(h[own_rows]), forced])))

    return View(model, logits)
