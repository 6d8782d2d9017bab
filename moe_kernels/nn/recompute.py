"""Activations that a backward computes again instead of keeping them."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels._checks import inside_checkpoint
from moe_kernels._recipes import Recipes

RECOMPUTE = ("none", "activations", "all")


class AsNow:
    """Context in which a module has the mode, parameters and buffers of now, and its running statistics stand still:
    a batch that is computed again does not count again."""

    def __init__(self, module: nn.Module) -> None:
        self.now = [(m, _state(m)) for m in module.modules()]

    def __enter__(self) -> None:
        self.before = [{name: getattr(m, name) for name in now} for m, now in self.now]
        for m, now in self.now:
            vars(m).update(now)

    def __exit__(self, *exception: object) -> None:
        for (m, _), before in zip(self.now, self.before, strict=True):
            vars(m).update(before)


def _state(m: nn.Module) -> dict[str, Any]:
    still = {"updates": False} if hasattr(m, "updates") else {}
    return {"training": m.training, "_parameters": dict(m._parameters), "_buffers": dict(m._buffers), **still}


class Again:
    """Context of one forward: `y = again(function, *tensors)` is function(*tensors), kept as its recipe.

    Whatever is computed from y inside and saves y for its backward saves the recipe, which keeps the tensors (or their
    recipes) instead. Recipes run with the module as it is now. Without grad, under torch.compile, which chooses by
    itself what to compute again, and inside torch.utils.checkpoint, `again` only calls the function.
    """

    def __init__(self, module: nn.Module, active: bool = True) -> None:
        self.active = active and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        self.active = self.active and not inside_checkpoint()
        self.recipes = Recipes(AsNow(module) if self.active else nullcontext())

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        y = function(*inputs)
        if self.active and y.requires_grad:
            self.recipes.record(y, function, inputs)
        return y

    def __enter__(self) -> "Again":
        if self.active:
            self._hooks = self.recipes.hooks()
            self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.active:
            self._hooks.__exit__(*exception)
            del self._hooks
        self.recipes.clear()
