"""Tensors that a backward computes again, from others that are kept, instead of keeping them."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from moe_kernels._torch import capture_autocast, saved_tensor_hooks, storage_key, storage_of, version

LEAF = object()  # stands for a tensor that is kept

Leaves = Iterator[Callable[[], Tensor]]  # in the order in which a recipe needs them


class Latest:
    """Holds the latest result that was computed on the way to another and that others will ask for, too."""

    result: Tensor | None = None


class Recipe:
    """How to compute y again: function(*inputs), each input a LEAF, a Part of another recipe's result or a constant."""

    def __init__(
        self, y: Tensor, function: Callable[..., Tensor], inputs: Sequence[Any], latest: Latest | None
    ) -> None:
        self.function, self.inputs, self.latest = function, inputs, latest
        self.shape, self.stride, self.dtype, self.device = y.shape, y.stride(), y.dtype, y.device
        self.autocast = capture_autocast(y.device.type)
        self.parts = [i.recipe for i in inputs if isinstance(i, Part)]
        self.steps: int = 1 + sum(recipe.steps for recipe in self.parts)
        self.num_leaves: int = sum(i is LEAF for i in inputs) + sum(recipe.num_leaves for recipe in self.parts)
        self.askers = 0  # recipes and backwards that will ask for the result
        self.result: StorageWeakRef | None = None

    def will_be_asked(self) -> None:
        """By one more, and from the first on all that it begins with will be, too."""
        if self.askers == 0:
            for recipe in self.parts:
                recipe.will_be_asked()
        self.askers += 1

    def compute(self, leaves: Leaves) -> Tensor:
        """The result, computed once for all that hold it at the same time."""
        storage = storage_of(self.result) if self.result else None
        if storage is not None:
            deque(islice(leaves, self.num_leaves), maxlen=0)  # are not needed
            return torch.empty(0, dtype=self.dtype, device=self.device).set_(storage, 0, self.shape, self.stride)
        inputs = [i.compute(leaves) if isinstance(i, Part) else next(leaves)() if i is LEAF else i for i in self.inputs]
        with self.autocast():
            y = self.function(*inputs)
        y = y if y.stride() == self.stride else y.new_empty_strided(self.shape, self.stride).copy_(y)
        self.result = StorageWeakRef(y.untyped_storage())
        return y


class Part(NamedTuple):
    """A view of a recipe's result."""

    recipe: Recipe
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def compute(self, leaves: Leaves) -> Tensor:
        y = self.recipe.compute(leaves)
        if self.recipe.latest and self.recipe.askers > 1:
            self.recipe.latest.result = y
        return self.of(y)

    def of(self, y: Tensor) -> Tensor:
        return y.as_strided(self.shape, self.stride, self.offset)


class Kept(NamedTuple):
    """What is kept instead of a tensor: how to compute it, and from what."""

    part: Part
    leaves: list[Any]


class _Known(NamedTuple):
    """The recipe of a living storage and its leaves, with the versions at which it holds."""

    storage: StorageWeakRef
    version: int
    recipe: Recipe
    leaves: list[Tensor]
    versions: list[int]


class Recipes:
    """The recipes of tensors that are alive; `hooks()` is a context in which they are kept instead of the tensors.

    Hooks that are active outside are given what is kept. Where there are none, a kept tensor that is written to before
    the backward is an error, as without hooks. Recipes run inside `during`. With `latest` a backward computes less and
    holds one tensor more.
    """

    def __init__(self, during: AbstractContextManager[Any] | None = None, latest: Latest | None = None) -> None:
        self.during = nullcontext() if during is None else during
        self._known: dict[int, _Known] = {}
        self._held: dict[int, StorageWeakRef] = {}
        self._latest = latest

    def __bool__(self) -> bool:
        return bool(self._known or self._held)

    def clear(self) -> None:
        self._known.clear()
        self._held.clear()

    def hold(self, x: Tensor) -> None:
        """x is kept anyway, or under autocast wider than it is, so that a recipe may begin at it."""
        self._known.pop(storage_key(x), None)
        self._held = {key: held for key, held in self._held.items() if not held.expired()}
        self._held[storage_key(x)] = StorageWeakRef(x.untyped_storage())

    def holds(self, x: Tensor) -> bool:
        held = self._held.get(storage_key(x))
        return held is not None and not held.expired()

    def record(self, y: Tensor, function: Callable[..., Tensor], inputs: Sequence[Any]) -> None:
        """y = function(*inputs), which gives the same again; tensors without a recipe are its leaves."""
        storage = y.untyped_storage()
        if y.storage_offset() or y.numel() * y.itemsize != storage.nbytes():
            return
        steps: list[Any] = []
        leaves: list[Tensor] = []
        for i in inputs:
            kept = self.find(i) if isinstance(i, Tensor) else None
            steps.append(kept.part if kept else LEAF if isinstance(i, Tensor) else i)
            leaves += kept.leaves if kept else [i.detach()] if isinstance(i, Tensor) else []  # a grad_fn: a cycle
        recipe = Recipe(y, function, steps, self._latest)
        known = _Known(StorageWeakRef(storage), version(y), recipe, leaves, [*map(version, leaves)])
        self._known = {key: other for key, other in self._known.items() if not other.storage.expired()}
        self._known[storage_key(y)] = known

    def find(self, x: Tensor) -> Kept | None:
        """What to keep instead of x, if it is known and would still give x."""
        known = self._known.get(storage_key(x)) if x.layout == torch.strided else None
        if known is None or known.storage.expired() or known.version != version(x) or known.recipe.dtype != x.dtype:
            return None
        if known.versions != [*map(version, known.leaves)]:
            return None
        return Kept(Part(known.recipe, x.shape, x.stride(), int(x.storage_offset())), known.leaves)

    def hooks(self) -> saved_tensors_hooks:
        outer = saved_tensor_hooks()
        outer_pack, outer_unpack = outer or (_hold, _release)
        during = self.during

        def pack(x: Tensor) -> Any:
            kept = self.find(x)
            if kept is None:
                return outer_pack(x)
            kept.part.recipe.will_be_asked()
            return Kept(kept.part, [outer_pack(leaf) for leaf in kept.leaves])

        def unpack(kept: Any) -> Tensor:
            if not isinstance(kept, Kept):
                return outer_unpack(kept)
            with torch.no_grad(), during:
                return kept.part.of(kept.part.recipe.compute(partial(outer_unpack, leaf) for leaf in kept.leaves))

        return saved_tensors_hooks(pack, unpack)


def _hold(x: Tensor) -> tuple[Tensor, int]:
    return x.detach(), version(x)


def _release(held: tuple[Tensor, int]) -> Tensor:
    x, at = held
    if version(x) != at:
        raise RuntimeError("one of the tensors needed for a gradient has been modified by an inplace operation")
    if x.numel() and not x.untyped_storage().nbytes():
        raise RuntimeError("a parameter needed for a gradient was freed by FSDP2; attack the sharded module itself")
    return x
