"""Any model as a classifier of images in [0, 1], with its route if it has one that can be attacked."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import RobustMoE, Routing
from rter.errors import UserError
from rter.models.classifier import RobustClassifier


class Adapted(nn.Module):
    """Logits [B, C] of images in [0, 1] from a model that expects images within bounds.

    Args:
        model: any callable; its result may have the logits as an attribute, as in transformers.
        bounds: the smallest and largest value of the images that it expects.
    """

    num_experts = 0

    def __init__(self, model: Callable[..., Any], bounds: tuple[float, float]) -> None:
        super().__init__()
        self.model = model
        self.bounds = bounds

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.model(self.scaled(x)), len(x))

    def scaled(self, x: Tensor) -> Tensor:
        low, high = self.bounds
        return x if self.bounds == (0, 1) else low + (high - low) * x


class AdaptedMixture(Adapted):
    """A model that offers `route(x)` and `forward(x, routing=...)`."""

    def __init__(self, model: Any, bounds: tuple[float, float], num_experts: int) -> None:
        super().__init__(model, bounds)
        self.num_experts = num_experts

    def route(self, x: Tensor) -> Routing:
        routing: Routing = self.model.route(self.scaled(x))  # type: ignore[attr-defined]
        return routing

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        if routing is None:
            return super().forward(x)
        return logits_of(self.model(self.scaled(x), routing=routing), len(x))


@dataclass(eq=False, frozen=True, repr=False)
class RoutingOfTokens(Routing):
    """The routing of images whose `tokens` are routed: that of the tokens' mean logits; forced for all at once."""

    tokens: Routing | None = None

    @classmethod
    def of(cls, tokens: Routing) -> "RoutingOfTokens":
        mean = tokens.logits.flatten(1, -2).mean(1)  # [B, E]
        image = Routing.from_logits(mean, 1, "hard")
        return cls(mean, image.weights, image.experts, tokens)

    @staticmethod
    def to_tokens(images: Routing, lead: torch.Size) -> Routing:
        """The routing of tokens [B, ...] that sends all tokens of an image where `images` sends the image."""
        count = lead[1:].numel()
        logits = images.logits.view(lead[0], *[1] * len(lead[1:]), -1).expand(*lead, -1)
        return Routing(logits, *(t.repeat_interleave(count, 0) for t in (images.weights, images.experts)))


class AdaptedInside(AdaptedMixture):
    """A model with one RobustMoE inside, which routes images, or the tokens [B, ...] of each."""

    def __init__(self, model: nn.Module, bounds: tuple[float, float], moe: RobustMoE) -> None:
        super().__init__(model, bounds, moe.num_experts)
        self.moe = moe

    def route(self, x: Tensor) -> Routing:
        routing = self._route(x)
        return RoutingOfTokens.of(routing) if routing.logits.ndim > 2 else routing

    def _route(self, x: Tensor) -> Routing:
        def stop(h: Tensor, routing: Routing | None = None) -> Tensor:
            raise _Routed(self.moe.route(h) if routing is None else routing)

        try:
            with _in_place_of_forward(self.moe, stop):
                self.model(self.scaled(x))
        except _Routed as found:
            return found.routing
        raise UserError("model must run its RobustMoE at every forward, but did not")

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        if routing is None:
            return super().forward(x)

        image = routing

        def forced(h: Tensor, routing: Routing | None = None) -> Tensor:
            chosen = image.tokens if isinstance(image, RoutingOfTokens) and image.tokens is not None else image
            lead = (self.moe.route(h) if routing is None else routing).logits.shape[:-1]
            chosen = RoutingOfTokens.to_tokens(chosen, lead) if chosen.logits.ndim < len(lead) + 1 else chosen
            return type(self.moe).forward(self.moe, h, chosen)

        with _in_place_of_forward(self.moe, forced):
            return super().forward(x)


class _Routed(Exception):  # noqa: N818, ends a forward once the route is known
    def __init__(self, routing: Routing) -> None:
        self.routing = routing


@contextmanager
def _in_place_of_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def logits_of(output: Any, batch: int) -> Tensor:
    """The logits in what a model returned for a batch of images."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        kind = f"a {type(output).__name__}" + (f" of {len(output)}" if isinstance(output, (tuple, list)) else "")
        raise UserError(f"model must return logits [B, classes], got {kind}: wrap it so that it returns them alone")
    if logits.ndim != 2 or len(logits) != batch or not logits.is_floating_point():
        raise UserError(
            f"model must return logits [{batch}, classes] for {batch} images, got {logits.dtype} {list(logits.shape)}"
        )
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def adapt(model: Any, x: Tensor, bounds: tuple[float, float]) -> tuple[nn.Module, str]:
    """The model as a classifier, and what the report says about its routes.

    Args:
        model: any callable from images to logits, in eval mode.
        x: a few images in [0, 1] to try it on.
        bounds: the smallest and largest value of the images that it expects.

    Raises:
        UserError: if it does not return logits.
    """
    if not callable(model):
        raise UserError(f"model must be a module or another callable from images to logits, got {type(model).__name__}")
    if isinstance(model, RobustClassifier) and bounds == (0, 1):
        adapted: nn.Module = model
        routes = "attacked" if model.num_experts > 1 else "none: the model has one expert"
    else:
        adapted, routes = _adapt(model, x, bounds)
    _check_logits(adapted, x)
    return adapted, routes


def _adapt(model: Any, x: Tensor, bounds: tuple[float, float]) -> tuple[Adapted, str]:
    plain = Adapted(model, bounds)
    with torch.no_grad(), _naming_the_model(x):
        plain(x)
    if callable(getattr(model, "route", None)) and _takes_routing(model):
        return _if_routed(AdaptedMixture(model, bounds, 0), plain, x)
    if not isinstance(model, nn.Module):
        return plain, "none attacked: the model is not a module, so its experts, if any, cannot be found"
    inner = getattr(model, "_orig_mod", model)  # since a compiled forward cannot be stopped at its route
    layers = [module for module in inner.modules() if isinstance(module, RobustMoE)]
    if not layers:
        return plain, "none: the model has no experts, so attacks on routes are skipped"
    if len(layers) > 1:
        return plain, f"NOT attacked: the model has {len(layers)} RobustMoE layers, and the attacks support one"
    if _calls(inner, layers[0], plain.scaled(x)) != 1:
        return plain, "NOT attacked: the RobustMoE does not run exactly once per forward"
    return _if_routed(AdaptedInside(inner, bounds, layers[0]), plain, x)


def _if_routed(mixture: AdaptedMixture, plain: Adapted, x: Tensor) -> tuple[Adapted, str]:
    """The mixture, if it routes whole images and the route has a gradient; otherwise the plain model, and why."""
    routing = mixture.route(x.clone().requires_grad_())
    if not isinstance(routing, Routing):
        raise UserError(f"model.route must return a moe_kernels.Routing, got {type(routing).__name__}")
    mixture.num_experts = routing.num_experts
    if routing.logits.ndim != 2 or len(routing.logits) != len(x):
        shape = list(routing.logits.shape)
        return plain, f"NOT attacked: the route of {len(x)} images has logits {shape} instead of {len(x)} rows"
    if not routing.logits.requires_grad:
        return plain, "NOT attacked: the route's logits have no gradient"
    if mixture.num_experts == 1:
        return mixture, "none: the model has one expert"
    together = ", all tokens of an image together" if isinstance(routing, RoutingOfTokens) else ""
    return mixture, f"attacked{together}"


def _takes_routing(model: Any) -> bool:
    parameters = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters
    return "routing" in parameters


def _calls(model: nn.Module, moe: RobustMoE, x: Tensor) -> int:
    calls: list[None] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        return type(moe).forward(moe, *args, **kwargs)

    with torch.no_grad(), _in_place_of_forward(moe, counted):
        model(x)
    return len(calls)


@contextmanager
def _naming_the_model(x: Tensor) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"model must accept images {str(x.dtype).removeprefix('torch.')} {list(x.shape)}, but raised "
            f"{type(error).__name__}: {said}"
        ) from error


@torch.no_grad()
def _check_logits(model: nn.Module, x: Tensor) -> None:
    logits = model(x)
    if logits.shape[1] < 2:
        raise UserError(f"model must return the logits of at least 2 classes, got shape {list(logits.shape)}")
    if not logits.isfinite().all():
        raise UserError(f"model must return finite logits, got {logits[~logits.isfinite()][0].item()} for an image")
    if logits.min() >= 0 and (logits.sum(1) - 1).abs().max() < 1e-3:
        raise UserError(
            "model must return logits, got probabilities (none below 0, and each row sums to 1), which hide gradients: "
            "return the input of the softmax"
        )
