"""Simulates the streams, graphs, allocator and generator of two CUDA devices on CPU tensors, with their errors.

The behaviour is that of torch 2.11 (`old`) or of later versions, according to ATen/cuda/CUDAGraph.cpp,
CUDAGeneratorImpl.cpp and c10/cuda/CUDACachingAllocator.cpp; `torch.cuda.graph`, `torch.cuda.stream` and
`torch.cuda.device` are torch's own.
"""

import threading
import warnings
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from moe_kernels.attacks import capture
from moe_kernels.testing.host_sync import waits

RANDOM = {torch.ops.aten.uniform_, torch.ops.aten.normal_, torch.ops.aten.rand, torch.ops.aten.bernoulli_}


class Stream:
    """torch.cuda.Stream; without `device` on the current one."""

    def __init__(self, cuda: "Cuda", device: int | None = None) -> None:
        self.device = torch.device("cuda", cuda.device if device is None else device)
        self.cuda, self.waited_for = cuda, []  # type: ignore[var-annotated]
        self.cuda_stream = id(self)

    def wait_stream(self, other: "Stream") -> None:
        self.waited_for.append(other)


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, cuda: "Cuda") -> None:
        self.cuda = cuda
        self.work: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self.written: list[tuple[Tensor, Tensor]] = []  # (tensor, its content before the recording)
        self.valid = True
        self.ended = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **_: Any) -> None:
        cuda = self.cuda
        self.stream, self.mode, self.thread = cuda.current_stream(), capture_error_mode, threading.get_ident()
        if self.stream is cuda.default[cuda.device]:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self.id = pool = pool or cuda.graph_pool_handle()
        cuda.generator_records = True
        if pool in cuda.underway:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        cuda.underway.append(pool)
        cuda.uses[pool] += 1
        cuda.recordings.append(self)
        cuda.begun += 1

    def capture_end(self) -> None:
        cuda = self.cuda
        if cuda.current_stream() is not self.stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        cuda.recordings.remove(self)
        for tensor, before in reversed(self.written):  # a real recording runs nothing
            tensor.copy_(before)
        if cuda.old and not self.valid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        cuda.underway.remove(self.id)
        if not self.valid:
            cuda.generator_records = False  # later versions reset it after a failure, too
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        cuda.generator_records = False
        if not self.work:
            warnings.warn("The CUDA Graph is empty.", stacklevel=2)
        self.ended = True

    def pool(self) -> Any:
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self.id

    def replay(self) -> None:
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        self.cuda.replays += 1
        with _disable_current_modes(), torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, out in self.work:
                for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


class Cuda(TorchDispatchMode):
    """Inside it, all tensors count as being on device `index`, and operations as work for its current stream."""

    def __init__(self, index: int, old: bool) -> None:
        super().__init__()
        self.index, self.old = index, old
        self.device = 0
        self.default = [Stream(self, i) for i in range(2)]
        self.current = list(self.default)
        self.sync_mode, self.warned = 0, False
        self.generator_records = False
        self.underway: list[Any] = []  # pools that the allocator believes are recorded to
        self.uses: Counter[Any] = Counter()
        self.recordings: list[Graph] = []
        self.begun = self.replays = self.pools = 0

    @property
    def entered(self) -> bool:
        return self in _get_current_dispatch_mode_stack()

    def current_stream(self, device: Any = None) -> Stream:
        return self.current[self.device if device is None else torch.device(device).index]

    def set_stream(self, stream: Stream) -> None:
        self.device = stream.device.index  # as torch's does
        self.current[self.device] = stream

    def index_of(self, device: Any = None, optional: bool = False, allow_cpu: bool = False) -> int:
        return self.device if device is None else device if isinstance(device, int) else torch.device(device).index

    def graph_pool_handle(self) -> tuple[int, int]:
        self.pools += 1
        return 0, self.pools

    def exchange_device(self, index: int) -> int:
        before, self.device = self.device, index if index >= 0 else self.device
        return before

    def set_sync_debug_mode(self, mode: int | str) -> None:
        if not self.warned:
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)
        self.warned = True
        self.sync_mode = {"default": 0, "warn": 1, "error": 2}[mode] if isinstance(mode, str) else mode

    def end_allocate(self, device: int, pool: Any) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release_pool(self, device: int, pool: Any) -> None:
        self.uses[pool] -= 1
        assert self.uses[pool] >= 0

    def empty_cache(self) -> None:
        if self.underway:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def prohibited(self) -> None:
        """Acts that invalidate a recording: synchronising, loading a module, allocating memory other than by torch."""
        hit = [g for g in self.recordings if g.mode == "global" or g.thread == threading.get_ident()]
        for graph in hit:
            graph.valid = False
        if hit:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": "cpu"}
        stream = self.current[self.index]
        recording = next((g for g in self.recordings if g.stream is stream), None)
        default_generator = func.overloadpacket in RANDOM and kwargs.get("generator") is None
        if default_generator and self.generator_records and recording is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        if recording is not None:
            names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            written = [t for name in names for t in tree_leaves(given.get(name)) if isinstance(t, Tensor)]
            recording.written += [(t, t.clone()) for t in written]
        out = func(*args, **kwargs)
        if waits(func, args, kwargs, out):
            if self.sync_mode == 2:
                raise RuntimeError("called a synchronizing CUDA operation")
            self.prohibited()
        if recording is not None:
            recording.work.append((func, args, kwargs, out))
        return out


def install(patch: pytest.MonkeyPatch, cuda: Cuda) -> None:
    """Replaces what torch.cuda takes from C++ by the stand-in."""
    generator = SimpleNamespace(
        get_state=lambda: torch.default_generator.get_state(), set_state=torch.default_generator.set_state
    )
    replaced: dict[str, Any] = {
        "CUDAGraph": lambda: Graph(cuda),
        "Stream": lambda: Stream(cuda),
        "current_stream": cuda.current_stream,
        "set_stream": cuda.set_stream,
        "current_device": lambda: cuda.device,
        "_exchange_device": cuda.exchange_device,
        "_maybe_exchange_device": cuda.exchange_device,
        "default_generators": (generator, generator),
        "graph_pool_handle": cuda.graph_pool_handle,
        "get_sync_debug_mode": lambda: cuda.sync_mode,
        "set_sync_debug_mode": cuda.set_sync_debug_mode,
        "_lazy_init": lambda: None,
        "synchronize": cuda.prohibited,
        "empty_cache": cuda.empty_cache,
    }
    for name, value in replaced.items():
        patch.setattr(torch.cuda, name, value)
    for name, value in {
        "_host_emptyCache": lambda: None,
        "_cuda_endAllocateToPool": cuda.end_allocate,
        "_cuda_releasePool": cuda.release_pool,
    }.items():
        patch.setattr(torch._C, name, value, raising=False)
    patch.setattr(capture, "TORCH", (capture.TORCH, __file__))  # in CUDA, its lines are C++ and in no traceback
    patch.setattr(torch.cuda, "_get_device_index", cuda.index_of)
