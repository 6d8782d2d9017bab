"""Activations that a backward recomputes instead of saving them.

A module marks results that are cheap to compute, `y = recomputed(function, *inputs)`; the network whose forward runs
decides whether they are saved, `with Recomputing(network)`.
"""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import _fsdp as fsdp
from moe_kernels._recipes import Recipes
from moe_kernels._torch import inside_checkpoint, inside_transform, state_of

RECOMPUTE = ("none", "activations", "all")
_THREAD = threading.local()


class WithStatistics(nn.Module):
    """Base of modules with running statistics, which batches in training mode update unless `updates` is False."""

    updates = True


def recomputed(function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """function(*inputs); apart from its inputs, the function may depend only on the network's state."""
    forward = None if torch.compiler.is_compiling() else getattr(_THREAD, "forward", None)
    y = function(*inputs)
    if forward is not None and y.requires_grad:
        forward.recipes.record(y, forward.unsharding(function), inputs)
    return y


class Recomputing:
    """Context of one forward, inside which operations do not save those of their inputs that were `recomputed`.

    The backward recomputes these from their own inputs, which are saved or recomputed in turn, with the module's state
    as it was at construction. Where the context is not active, `recomputed` only calls the function: without grad,
    inside torch.utils.checkpoint, under torch.func, and under torch.compile, which itself chooses what to recompute.
    """

    def __init__(self, module: nn.Module, active: bool = True) -> None:
        self.active = active and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        self.active = self.active and not inside_checkpoint() and not inside_transform()
        self.recipes = Recipes(ModuleSnapshot(module) if self.active else nullcontext())
        self.owners = fsdp.owners(module) if self.active else {}

    def unsharding(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The same function, preceded by FSDP2's unshard of the module that it is, or is a method of."""
        module = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
        unit = self.owners.get(module) if isinstance(module, nn.Module) else None
        if unit is None:
            return function

        def unsharded(*inputs: Tensor) -> Tensor:
            unit.unshard()  # the unit's own backward, which comes next, shards it again
            return function(*inputs)

        return unsharded

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            return
        self._outer, _THREAD.forward = getattr(_THREAD, "forward", None), self if self.active else None
        self._hooks = self.recipes.hooks() if self.active else nullcontext()
        self._hooks.__enter__()

    def __exit__(self, *exception: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._hooks.__exit__(*exception)
        _THREAD.forward = self._outer
        del self._hooks, self._outer
        self.recipes.clear()


class ModuleSnapshot:
    """Context in which a module's mode, parameters and buffers are as they were when the snapshot was taken. Running
    statistics are not updated, since a recomputed batch must not count twice. FSDP2 itself brings back the parameters
    of its units."""

    def __init__(self, module: nn.Module) -> None:
        sharded = fsdp.owners(module)
        self.taken = [(m, _state(m, m not in sharded)) for m in module.modules()]

    def __enter__(self) -> None:
        self.before = [{name: getattr(m, name) for name in state} for m, state in self.taken]
        for m, state in self.taken:
            vars(m).update(state)

    def __exit__(self, *exception: object) -> None:
        for (m, _), before in zip(self.taken, self.before, strict=True):
            vars(m).update(before)


def _state(m: nn.Module, parameters: bool) -> dict[str, Any]:
    still = {"updates": False} if isinstance(m, WithStatistics) else {}
    return {**state_of(m, parameters), **still}
