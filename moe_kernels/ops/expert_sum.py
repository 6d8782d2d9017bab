"""Sums over the rows of each expert, and over rows with the same index: the gradients of a bias and of a gather."""

from typing import Any

import torch
from torch import Tensor

from moe_kernels._library import define
from moe_kernels._torch import inside_transform


def expert_of_row(offsets: Tensor, num_rows: int) -> Tensor:
    """int32 [num_rows]: the expert that each sorted row belongs to."""
    row = torch.arange(num_rows, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), row, right=True, out_int32=True)


class _Gather(torch.autograd.Function):
    """x[index] with a gradient that is summed in a fixed order, which torch's own is not on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return index_sum(grad, *ctx.saved_tensors, ctx.num_rows), None


class _ExpandToRows(torch.autograd.Function):
    """`_Gather` for sorted indices. (A product with one-hot rows would spread a NaN to all rows.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(offsets)
        return x.index_select(0, expert_of_row(offsets, num_rows))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return expert_sum(grad, *ctx.saved_tensors), None, None


def expand_to_rows(x: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    """For every sorted row, its expert's row of x [E, D] -> [num_rows, D]."""
    if inside_transform():
        return x.index_select(0, expert_of_row(offsets, num_rows))
    return _ExpandToRows.apply(x, offsets, num_rows)


def _sum_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets = inputs
    ctx.num_rows = x.shape[0]
    ctx.save_for_backward(offsets)


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (offsets,) = ctx.saved_tensors
    return expand_to_rows(grad, offsets, ctx.num_rows), None


expert_sum = define(
    "expert_sum(Tensor x, Tensor offsets) -> Tensor",
    lambda x, offsets: x.new_empty(offsets.shape[0] - 1, x.shape[1]),
    setup_context=_sum_setup_context,
    backward=_sum_backward,
)
"""x [N, D] sorted by expert, offsets int32 [E + 1] -> [E, D]: the sum of each expert's rows, zero if it has none."""


def _index_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _index_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (index,) = ctx.saved_tensors
    return grad.index_select(0, index) if inside_transform() else _Gather.apply(grad, index), None, None


index_sum = define(
    "index_sum(Tensor x, Tensor index, SymInt num_rows) -> Tensor",
    lambda x, index, num_rows: x.new_empty(num_rows, x.shape[1]),
    setup_context=_index_setup_context,
    backward=_index_backward,
)
"""x [N, D], index int32 [N], num_rows -> [num_rows, D]: for each r the sum of the rows x[j] with index[j] = r."""
