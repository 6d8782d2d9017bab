"""Tensors that are not kept for a backward, which recomputes them from others that are."""

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
    """Keeps alive the latest intermediate result that other recipes will ask for too."""

    result: Tensor | None = None


class Recipe:
    """How to compute y again: function(*inputs), each input a LEAF, a View of another recipe's result or a constant."""

    def __init__(
        self, y: Tensor, function: Callable[..., Tensor], inputs: Sequence[Any], latest: Latest | None
    ) -> None:
        self.function, self.inputs, self.latest = function, inputs, latest
        self.shape, self.stride, self.dtype, self.device = y.shape, y.stride(), y.dtype, y.device
        self.autocast = capture_autocast(y.device.type)
        self.origins = [i.recipe for i in inputs if isinstance(i, View)]
        self.steps: int = 1 + sum(recipe.steps for recipe in self.origins)
        self.num_leaves: int = sum(i is LEAF for i in inputs) + sum(recipe.num_leaves for recipe in self.origins)
        self.uses = 0  # recipes and backwards that will ask for the result
        self.result: StorageWeakRef | None = None

    def add_use(self) -> None:
        """Counts one more use of the result; the first is also a use of each result that it is computed from."""
        if self.uses == 0:
            for recipe in self.origins:
                recipe.add_use()
        self.uses += 1

    def compute(self, leaves: Leaves) -> Tensor:
        """The result, computed once for all who hold it at the same time."""
        storage = storage_of(self.result) if self.result else None
        if storage is not None:
            deque(islice(leaves, self.num_leaves), maxlen=0)  # skips leaves that are not needed
            return torch.empty(0, dtype=self.dtype, device=self.device).set_(storage, 0, self.shape, self.stride)
        inputs = [i.compute(leaves) if isinstance(i, View) else next(leaves)() if i is LEAF else i for i in self.inputs]
        with self.autocast():
            y = self.function(*inputs)
        y = y if y.stride() == self.stride else y.new_empty_strided(self.shape, self.stride).copy_(y)
        self.result = StorageWeakRef(y.untyped_storage())
        return y


class View(NamedTuple):
    """A view of a recipe's result."""

    recipe: Recipe
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def compute(self, leaves: Leaves) -> Tensor:
        y = self.recipe.compute(leaves)
        if self.recipe.latest and self.recipe.uses > 1:
            self.recipe.latest.result = y
        return self.of(y)

    def of(self, y: Tensor) -> Tensor:
        return y.as_strided(self.shape, self.stride, self.offset)


class Saved(NamedTuple):
    """What a backward saves instead of a tensor: how to compute it, and from what."""

    view: View
    leaves: list[Any]


class _Entry(NamedTuple):
    """The recipe for a storage that is alive, its leaves, and the versions of both for which it holds."""

    storage: StorageWeakRef
    version: int
    recipe: Recipe
    leaves: list[Tensor]
    versions: list[int]


class Recipes:
    """The recipes for tensors that are alive; inside the context `hooks()`, they are saved in place of the tensors.

    What is saved is passed on to the saved-tensor hooks that are active outside. If there are none, writing to a saved
    tensor before the backward is an error, as it is without hooks. Recipes run inside `during`. With `latest`, a
    backward computes less and holds one more tensor.
    """

    def __init__(self, during: AbstractContextManager[Any] | None = None, latest: Latest | None = None) -> None:
        self.during = nullcontext() if during is None else during
        self._entries: dict[int, _Entry] = {}
        self._sources: dict[int, StorageWeakRef] = {}
        self._latest = latest

    def __bool__(self) -> bool:
        return bool(self._entries or self._sources)

    def clear(self) -> None:
        self._entries.clear()
        self._sources.clear()

    def add_source(self, x: Tensor) -> None:
        """Notes that x is kept anyway (under autocast perhaps in a wider dtype), so that a recipe may begin at it."""
        self._entries.pop(storage_key(x), None)
        self._sources = {key: source for key, source in self._sources.items() if not source.expired()}
        self._sources[storage_key(x)] = StorageWeakRef(x.untyped_storage())

    def is_source(self, x: Tensor) -> bool:
        source = self._sources.get(storage_key(x))
        return source is not None and not source.expired()

    def record(self, y: Tensor, function: Callable[..., Tensor], inputs: Sequence[Any]) -> None:
        """Records y = function(*inputs), which a second call must reproduce; tensors without a recipe become leaves."""
        storage = y.untyped_storage()
        if y.storage_offset() or y.numel() * y.itemsize != storage.nbytes():
            return
        steps: list[Any] = []
        leaves: list[Tensor] = []
        for i in inputs:
            if not isinstance(i, Tensor):
                steps.append(i)
            elif saved := self.find(i):
                steps.append(saved.view)
                leaves += saved.leaves
            else:
                steps.append(LEAF)
                leaves.append(i.detach())  # its grad_fn would close a cycle
        recipe = Recipe(y, function, steps, self._latest)
        entry = _Entry(StorageWeakRef(storage), version(y), recipe, leaves, [*map(version, leaves)])
        self._entries = {key: other for key, other in self._entries.items() if not other.storage.expired()}
        self._entries[storage_key(y)] = entry

    def find(self, x: Tensor) -> Saved | None:
        """What to keep instead of x, if its recipe is known and would still give x."""
        entry = self._entries.get(storage_key(x)) if x.layout == torch.strided else None
        if entry is None or entry.storage.expired() or entry.version != version(x) or entry.recipe.dtype != x.dtype:
            return None
        if entry.versions != [*map(version, entry.leaves)]:
            return None
        return Saved(View(entry.recipe, x.shape, x.stride(), int(x.storage_offset())), entry.leaves)

    def hooks(self) -> saved_tensors_hooks:
        outer = saved_tensor_hooks()
        outer_pack, outer_unpack = outer or (_pack, _unpack)
        during = self.during

        def pack(x: Tensor) -> Any:
            saved = self.find(x)
            if saved is None:
                return outer_pack(x)
            saved.view.recipe.add_use()
            return Saved(saved.view, [outer_pack(leaf) for leaf in saved.leaves])

        def unpack(saved: Any) -> Tensor:
            if not isinstance(saved, Saved):
                return outer_unpack(saved)
            with torch.no_grad(), during:
                return saved.view.of(saved.view.recipe.compute(partial(outer_unpack, leaf) for leaf in saved.leaves))

        return saved_tensors_hooks(pack, unpack)


def _pack(x: Tensor) -> tuple[Tensor, int]:
    return x.detach(), version(x)


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    x, at = packed
    if version(x) != at:
        raise RuntimeError("one of the tensors needed for a gradient has been modified by an inplace operation")
    if x.numel() and not x.untyped_storage().nbytes():
        raise RuntimeError("a parameter needed for a gradient was freed by FSDP2; attack the sharded module itself")
    return x
