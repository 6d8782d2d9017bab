"""Attacks on mixtures of experts, whose route is piecewise constant and so hides gradients from ordinary attacks.

A model needs only `num_experts`, `route(x, top_k=None)` and `forward(x, routing=None)`, as `RobustMoE` has them. An
attack succeeds when it fools the whole model.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels.attacks.apgd import APGD, Goal
from moe_kernels.attacks.attack import Best
from moe_kernels.attacks.losses import margin

# A margin beyond this is won: on the digits 1 left 236 images of 360 standing, 0.3 235, 0.1 to 0.01 230 to 233.
MARGIN_CAP = 0.05


def check_mixture(model: Any) -> None:
    missing = [name for name in ("num_experts", "route") if not hasattr(model, name)]
    if missing:
        raise ValueError(f"model must be a mixture of experts, got {type(model).__name__} without {missing[0]}")


def every_expert(model: Any, x: Tensor) -> Tensor:
    """[E, B, C]: the logits of each expert alone, with gate 1, on x [B, ...], computed as one batch of E * B rows."""
    route = model.route(x)
    forced = type(route).cat([route.fixed(e) for e in range(model.num_experts)])
    logits = model(x.repeat(model.num_experts, *[1] * (x.ndim - 1)), routing=forced)
    return logits.view(model.num_experts, len(x), -1)


class SoftBackward(nn.Module):
    """Wraps a mixture for any attack: returns its own logits, but with the gradient of the soft mixture of all experts,

        sum_e softmax(g / temperature)_e f_e(x),

    which is not cut off by the choice of the route (backward pass differentiable approximation, Athalye et al. 2018).

    Args:
        model: a mixture of experts.
        temperature: of the softmax, above 0; the higher, the more the experts that were not chosen count.

    Raises:
        ValueError: if model is not a mixture or temperature is not above 0.

    Example:
        x_adv = APGD(SoftBackward(model, temperature=4.0), "8/255", loss="margin", seed=0)(x, y)
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        check_mixture(model)
        self.model: Any = model
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        gates = (self.model.route(x).logits / self.temperature).softmax(-1)
        experts = every_expert(self.model, x)
        soft = (gates.T[:, :, None] * experts).sum(0)
        with torch.no_grad():
            hard = self.model(x)
        return hard + (soft - soft.detach())


class RouterLogits(nn.Module):
    """Wraps a mixture for any attack: returns the router's logits [B, E]. With the chosen experts as labels, the attack
    is on the route alone.

    Raises:
        ValueError: if model is not a mixture.

    Example:
        chosen = model.route(x).experts[:, 0].long()
        x_adv = APGD(RouterLogits(model), "8/255", loss="margin", seed=0)(x, chosen)
        flipped = model.route(x_adv).experts[:, 0] != chosen
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        check_mixture(model)
        self.model: Any = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.route(x).logits


class ExpertAttack(APGD):
    """APGD on each expert e in turn, which fools f_e and at the same time steers the route to e. It ascends

        min(margin of f_e, 0.05) + weight * min(g_e - max_{j != e} g_j, 0.05),

    with each row of logits divided by its standard deviation, so that the two margins are comparable. A margin of 0.05
    counts as won and is pushed no further.

    Args:
        model: a mixture of experts.
        eps, steps: as in `APGD`; each expert gets `steps` steps.
        weight: of the route's term.
        options: any other argument of `APGD`, except loss.

    Raises:
        ValueError: if model is not a mixture, or an argument is not as `APGD` describes it.

    Example:
        x_adv = ExpertAttack(model, "8/255", steps=100, seed=0)(x, y)
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float | str | Tensor = 8 / 255,
        *,
        steps: int = 100,
        weight: float = 0.1,
        **options: Any,
    ) -> None:
        check_mixture(model)
        super().__init__(model, eps, steps=steps, loss="margin", **options)
        self.model: Any = model
        self.weight = weight

    def _goals(self, x: Tensor, y: Tensor, kwargs: dict[str, Any]) -> Iterator[Callable[[Tensor], Any]]:
        for _ in range(self.restarts):
            for e in range(self.model.num_experts):
                yield lambda rows, e=e: self._towards(torch.full_like(y[rows], e), y[rows])  # type: ignore[misc]

    def _towards(self, expert: Tensor, y: Tensor, route_only: bool = False) -> Goal:
        def goal(x: Tensor) -> tuple[Tensor, Tensor]:
            with self._in_model:
                route = self.model.route(x)
            objective = self.weight * _capped(-margin(_standardised(route.logits), expert))
            if not route_only:
                forced = dataclasses.replace(route.fixed(0), experts=expert[:, None].to(route.experts.dtype))
                objective = objective + _capped(margin(_standardised(self._logits(x, {"routing": forced})), y))
            with torch.no_grad():
                success = self._logits(x, {"routing": route}).argmax(1) != y
            return objective, success

        return goal


class JointAttack(ExpertAttack):
    """Moves each sample's route to its weakest expert, the one that prefers the true class least on the clean sample,
    then attacks that expert from there while holding the route. Each phase takes `steps` steps. Arguments and errors
    are those of `ExpertAttack`.

    Example:
        x_adv = JointAttack(model, "8/255", steps=100, seed=0)(x, y)
    """

    def _goals(self, x: Tensor, y: Tensor, kwargs: dict[str, Any]) -> Iterator[Callable[[Tensor], Any]]:
        with torch.no_grad():
            weakest = torch.stack([margin(_standardised(alone), y) for alone in every_expert(self.model, x)]).argmax(0)
        for _ in range(self.restarts):
            yield lambda rows: (
                self._towards(weakest[rows], y[rows], route_only=True),
                self._towards(weakest[rows], y[rows]),
            )

    def _ascend(self, x_adv: Tensor, x: Tensor, eps: Tensor, goal: Any) -> Best:
        for each in goal:
            best = super()._ascend(x_adv, x, eps, each)
            x_adv = best.x
        return best


def _standardised(logits: Tensor) -> Tensor:
    """Each row divided by its standard deviation, through which no gradient flows."""
    return logits / logits.detach().std(1, keepdim=True, correction=0).clamp(min=1e-12)


def _capped(margin: Tensor) -> Tensor:
    return margin.clamp(max=MARGIN_CAP)
