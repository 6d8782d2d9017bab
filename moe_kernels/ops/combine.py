"""Combines sorted rows: out[t] = sum over i of weights[t, i] * y[position[t, i]].

Its gradients in y (`combine_input_grad`) and weights (`combine_weight_grad`) are operators too, and all three are each
other's derivatives.
"""

from typing import Any

import torch
from torch import Tensor

from moe_kernels import _checks as check
from moe_kernels import backends
from moe_kernels._library import define
from moe_kernels._torch import inside_transform


def combine(y: Tensor, weights: Tensor, position: Tensor, *, backend: str | None = None) -> Tensor:
    """Sums each row's k slots, multiplied by their weights, in the order of i, in fp32 (fp64 for fp64 y).

    Args:
        y: [T * k, ...], one row per sorted slot.
        weights: [T, k], any floating-point dtype.
        position: int32 [T, k], the sorted place of each slot; contains each of 0 to T * k - 1 once.
        backend: None for the fastest on y's device, or "reference".

    Returns:
        [T, ...] with y's dtype.

    Raises:
        ValueError: if a shape, dtype or device does not match or, on the CPU, position is not a permutation.
    """
    check.floating("y", y)
    check.floating("weights", weights)
    check.ndim("weights", weights, 2)
    check.same_device("weights", weights, "y", y)
    check.indices("position", position, y, ndim=2, like_name="y")
    check.shape("position", position, tuple(weights.shape), "[T, k] like weights")
    check.shape("y", y, (weights.numel(), *y.shape[1:]), "[T * k, ...] with weights [T, k]")
    return backends.choose("combine", backend, y)(y, weights, position)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, weights, position = inputs
    y_needs, weights_needs = ctx.needs_input_grad[:2]
    ctx.weights_dtype = weights.dtype
    ctx.save_for_backward(y if weights_needs else None, weights if y_needs else None, position)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, weights, position = ctx.saved_tensors
    dy = dweights = None
    if ctx.needs_input_grad[0]:
        dy = combine_input_grad(grad, weights, position)
    if ctx.needs_input_grad[1]:
        dweights = combine_weight_grad(grad, y, position).to(ctx.weights_dtype)
    return dy, dweights, None


combine_unchecked = define(
    "combine(Tensor y, Tensor weights, Tensor position) -> Tensor",
    lambda y, weights, position: y.new_empty(position.shape[0], *y.shape[1:]),
    setup_context=_setup_context,
    backward=_backward,
)


def _input_grad_backward(ctx: Any, ddy: Tensor) -> tuple[Tensor | None, ...]:
    grad, weights, position = ctx.saved_tensors
    dgrad = dweights = None
    if ctx.needs_input_grad[0]:
        dgrad = combine_unchecked(ddy, weights, position)
    if ctx.needs_input_grad[1]:
        dweights = combine_weight_grad(grad, ddy, position).to(ctx.weights_dtype)
    return dgrad, dweights, None


combine_input_grad = define(
    "combine_input_grad(Tensor grad, Tensor weights, Tensor position) -> Tensor",
    lambda grad, weights, position: grad.new_empty(position.numel(), *grad.shape[1:]),
    setup_context=_setup_context,
    backward=_input_grad_backward,
)
"""grad [T, ...], weights [T, k], position int32 [T, k] -> [T * k, ...]: `combine`'s gradient in y."""


def _weight_grad_fake(grad: Tensor, y: Tensor, position: Tensor) -> Tensor:
    return y.new_empty(position.shape, dtype=torch.promote_types(y.dtype, torch.float32))


def _weight_grad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, y, position = inputs
    grad_needs, y_needs = ctx.needs_input_grad[:2]
    ctx.save_for_backward(grad if y_needs else None, y if grad_needs else None, position)


def _weight_grad_backward(ctx: Any, ddweights: Tensor) -> tuple[Tensor | None, ...]:
    grad, y, position = ctx.saved_tensors
    dgrad = dy = None
    if ctx.needs_input_grad[0]:
        dgrad = combine_unchecked(y, ddweights, position)
    if ctx.needs_input_grad[1]:
        dy = combine_input_grad(grad, ddweights, position)
    return dgrad, dy, None


combine_weight_grad = define(
    "combine_weight_grad(Tensor grad, Tensor y, Tensor position) -> Tensor",
    _weight_grad_fake,
    setup_context=_weight_grad_setup_context,
    backward=_weight_grad_backward,
)
"""grad [T, ...], y [T * k, ...], position int32 [T, k] -> fp32 or fp64 [T, k]: `combine`'s gradient in weights."""


def gather_rows(x: Tensor, rows: Tensor, position: Tensor) -> Tensor:
    """x[rows] for x [T, ...] and the row rows[j] = order[j] // k of each sorted slot j -> [T * k, ...].

    Its gradient is a `combine` with weights of 1, which sums a row's slots in a fixed order.
    """
    return x.index_select(0, rows) if inside_transform() else _GatherRows.apply(x, rows, position)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(position)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (position,) = ctx.saved_tensors
        ones = grad.new_ones(position.shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        return combine(grad, ones, position), None, None
