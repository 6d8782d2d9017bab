"""Rules for pooling, which keep the indices of pixels or nothing at all."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels._torch import adaptive_avg_pool2d_backward, adaptive_avg_pool3d_backward
from moe_kernels.attacks.autograd import Rule, Size, blank_like, each, lean

aten = torch.ops.aten


def _max_pool(
    func: Any,
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    n, pool, pool_backward = _MAX_POOLS[func]
    if return_indices or input.ndim != n + 2:
        return NotImplemented
    sizes = (kernel_size, stride if stride is not None else kernel_size, padding, dilation)
    settings = (*(each(size, n) for size in sizes), ceil_mode)
    return _keeping_indices(
        input, lambda x: pool(x, *settings), lambda grad, x, indices: pool_backward(grad, x, *settings, indices)
    )


def _adaptive_max_pool(
    func: Any, input: Tensor, output_size: Size | Sequence[int | None], return_indices: bool = False
) -> Tensor:
    n, pool, pool_backward = _ADAPTIVE_MAX_POOLS[func]
    if return_indices or input.ndim != n + 2:
        return NotImplemented
    pairs = zip(each(output_size, n), input.shape[2:], strict=True)
    sizes = [whole if size is None else size for size, whole in pairs]
    return _keeping_indices(input, lambda x: pool(x, sizes), pool_backward)


def _keeping_indices(
    x: Tensor, pool: Callable[[Tensor], tuple[Tensor, Tensor]], pool_backward: Callable[..., Tensor]
) -> Tensor:
    """y of y, indices = pool(x); the indices of pixels, int64, are kept in the narrowest dtype that holds them."""
    dtype = torch.int16 if math.prod(x.shape[2:]) < 2**15 else torch.int32
    blank = blank_like(x)

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, indices = pool(x)
        return y, (indices.to(dtype),)

    def backward(grad: Tensor, indices: Tensor) -> Tensor:
        return pool_backward(grad, blank(grad), indices.long())

    return lean(x, forward, backward)


def _avg_pool(
    func: Any,
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    n, pool_backward = _AVG_POOLS[func]
    if input.ndim != n + 2:
        return NotImplemented
    sizes = (kernel_size, stride if stride is not None else kernel_size, padding)
    settings = (*(each(size, n) for size in sizes), ceil_mode, count_include_pad, divisor_override)
    blank = blank_like(input)
    return lean(input, lambda x: (func(x, *settings), ()), lambda grad: pool_backward(grad, blank(grad), *settings))


def _adaptive_avg_pool(func: Any, input: Tensor, output_size: Size | Sequence[int | None]) -> Tensor:
    n, pool_backward = _ADAPTIVE_AVG_POOLS[func]
    if input.ndim != n + 2 or each(output_size, n) == [1] * n:  # which torch computes as a mean
        return NotImplemented
    blank = blank_like(input)
    return lean(input, lambda x: (func(x, output_size), ()), lambda grad: pool_backward(grad, blank(grad)))


def _of_signals(rule: Rule, pool2d: Any) -> Rule:
    """The rule for pooling signals [B, C, L], which it treats, as torch does, as images of one row."""
    signature = inspect.signature(rule)

    @functools.wraps(rule)
    def pool1d(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(pool2d, input.unsqueeze(-2), *args, **kwargs).arguments
        for name, height in _OF_A_ROW.items():
            if given.get(name):
                given[name] = [height, *each(given[name], 1)]
        y = rule(**given)
        return y if y is NotImplemented else y.squeeze(-2)

    return pool1d


_OF_A_ROW = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "output_size": 1}  # their first entry
_MAX_POOLS = {
    F.max_pool2d: (2, aten.max_pool2d_with_indices, aten.max_pool2d_with_indices_backward),
    torch.max_pool2d: (2, aten.max_pool2d_with_indices, aten.max_pool2d_with_indices_backward),
    F.max_pool3d: (3, aten.max_pool3d_with_indices, aten.max_pool3d_with_indices_backward),
    torch.max_pool3d: (3, aten.max_pool3d_with_indices, aten.max_pool3d_with_indices_backward),
}
_AVG_POOLS = {F.avg_pool2d: (2, aten.avg_pool2d_backward), F.avg_pool3d: (3, aten.avg_pool3d_backward)}
_ADAPTIVE_MAX_POOLS = {
    F.adaptive_max_pool2d: (2, aten.adaptive_max_pool2d, aten.adaptive_max_pool2d_backward),
    F.adaptive_max_pool3d: (3, aten.adaptive_max_pool3d, aten.adaptive_max_pool3d_backward),
}
_ADAPTIVE_AVG_POOLS = {
    F.adaptive_avg_pool2d: (2, adaptive_avg_pool2d_backward),
    F.adaptive_avg_pool3d: (3, adaptive_avg_pool3d_backward),
}

POOLINGS: dict[Any, Rule] = {
    **dict.fromkeys(_MAX_POOLS, _max_pool),
    **dict.fromkeys([F.max_pool1d, torch.max_pool1d], _of_signals(_max_pool, F.max_pool2d)),
    **dict.fromkeys(_ADAPTIVE_MAX_POOLS, _adaptive_max_pool),
    F.adaptive_max_pool1d: _of_signals(_adaptive_max_pool, F.adaptive_max_pool2d),
    **dict.fromkeys(_AVG_POOLS, _avg_pool),
    F.avg_pool1d: _of_signals(_avg_pool, F.avg_pool2d),
    **dict.fromkeys(_ADAPTIVE_AVG_POOLS, _adaptive_avg_pool),
    F.adaptive_avg_pool1d: _of_signals(_adaptive_avg_pool, F.adaptive_avg_pool2d),
}
