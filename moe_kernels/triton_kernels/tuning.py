"""Opt-in search for a faster tile than the shipped one: times the shipped one and its neighbours on the device."""

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from moe_kernels.triton_kernels.configs import Tile

if TYPE_CHECKING:
    from moe_kernels.triton_kernels.launch import Launch

_depth = 0  # nested autotune() contexts; global, because a backward runs in other threads
fastest: dict[Hashable, Tile] = {}  # the choices made so far


@contextmanager
def autotune() -> Iterator[None]:
    """Context inside which the grouped GEMMs and convolutions on a GPU run with tiles found by timing.

    The first call of a kernel with sizes of a new magnitude (sizes rounded up to powers of two) tries about ten tiles,
    which takes some seconds; tiles that need more memory than the device has are skipped. The choice is kept until the
    process ends, but is used only inside this context. Nothing is timed while a CUDA graph is captured. Another tile
    may round a sum differently.
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def choose(make: Callable[[Tile], "Launch"], shipped: Tile) -> Tile:
    """The tile to launch with: the shipped one, unless autotune() is active and knows or finds a faster one."""
    if _depth == 0:
        return shipped
    key = _key(make(shipped))
    if key not in fastest and not _capturing():
        fastest[key] = min(neighbours(shipped), key=lambda tile: milliseconds(make, tile))
    return fastest.get(key, shipped)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def neighbours(tile: Tile) -> list[Tile]:
    """The tile itself, and those that differ from it in one field."""
    m, n, _, warps, stages, _ = tile
    changed = [tile._replace(m=m // 2), tile._replace(m=2 * m), tile._replace(n=n // 2), tile._replace(n=2 * n)]
    changed += [tile._replace(num_stages=stages - 1), tile._replace(num_stages=stages + 1)]
    changed += [tile._replace(num_warps=4 if warps == 8 else 8), tile._replace(tma=not tile.tma)]
    return [tile, *(t for t in changed if min(t.m, t.n) >= 16 and max(t.m, t.n) <= 256 and t.num_stages >= 1)]


def milliseconds(make: Callable[[Tile], "Launch"], tile: Tile) -> float:
    """Median time of a launch with the tile; infinite if it does not compile or does not fit the device's memory."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    launch = make(tile)
    try:
        launch.compile()
    except Exception:  # a failing compiler pass raises nothing more specific than RuntimeError
        return math.inf
    try:
        return float(do_bench(launch.run, warmup=5, rep=20, return_mode="median"))
    except OutOfResources:
        return math.inf


def _key(launch: "Launch") -> Hashable:
    """What a choice of tile is remembered by: the kernel, and its arguments with sizes rounded up to powers of two."""

    def rounded(value: Any) -> Hashable:
        if isinstance(value, torch.Tensor):
            return value.device, value.dtype, tuple(_power_of_two(size) for size in value.shape)
        return rounded(value.base) if hasattr(value, "base") else value

    varying = ("num_rows", "BLOCK_M", "BLOCK_N", "BLOCK_K")
    arguments = ((name, rounded(value)) for name, value in launch.arguments.items() if name not in varying)
    return launch.kernel.__name__, *arguments


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
