"""Activations that a backward computes again instead of keeping them."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from moe_kernels._checks import inside_checkpoint

RECOMPUTE = ("none", "activations", "all")


def check_recompute(recompute: str) -> None:
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")


class Recipe:
    """How to compute a tensor again: a function and its inputs, each a tensor or a recipe."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        self.function, self.inputs = function, inputs

    def __call__(self) -> Tensor:
        return self.function(*(i() if isinstance(i, Recipe) else i for i in self.inputs))


class Again:
    """Context of one forward: `y = again(function, *tensors)` is function(*tensors), kept as its recipe.

    Whatever is computed from y inside and saves y for its backward saves the recipe, which keeps the tensors (or their
    recipes) instead. Recipes run inside `during`. Without grad, under torch.compile, which chooses
    by itself what to compute again, and inside torch.utils.checkpoint, `again` only calls the function.
    """

    def __init__(self, during: AbstractContextManager[Any], active: bool = True) -> None:
        self.during = during
        self.active = active and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        self.active = self.active and not inside_checkpoint()
        self.recipes: dict[int, tuple[weakref.ref[Tensor], Recipe]] = {}

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        y = function(*inputs)
        if self.active and y.requires_grad:
            recipe = Recipe(function, tuple(self._recipe(i) or i.detach() for i in inputs))
            self.recipes[y.data_ptr()] = weakref.ref(y), recipe
        return y

    def __enter__(self) -> "Again":
        if self.active:
            self._hooks = self._make_hooks()
            self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.active:
            self._hooks.__exit__(*exception)
            del self._hooks
        self.recipes.clear()

    def _recipe(self, x: Tensor) -> Recipe | None:
        y, recipe = self.recipes.get(x.data_ptr(), (lambda: None, None))
        alive = y()  # else its memory may be another tensor's
        return recipe if alive is not None and alive.shape == x.shape else None

    def _make_hooks(self) -> saved_tensors_hooks:
        outer_pack, outer_unpack = torch._C._autograd._top_saved_tensors_default_hooks(True) or (_same, _same)
        casts = [
            torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), False)
            for device in ("cpu", "cuda")
        ]
        during = self.during

        def pack(x: Tensor) -> Any:
            return self._recipe(x) or outer_pack(x)

        def unpack(kept: Any) -> Tensor:
            if not isinstance(kept, Recipe):
                return outer_unpack(kept)
            with torch.no_grad(), casts[0], casts[1], during:
                return kept()

        return saved_tensors_hooks(pack, unpack)


def _same(x: Tensor) -> Tensor:
    return x
