"""Grouped linear layer: row j of expert e becomes x[j] @ weight[e].T + bias[e]."""

from typing import Any

from torch import Tensor

from moe_kernels import _checks as check
from moe_kernels import backends
from moe_kernels._library import define
from moe_kernels._torch import cast_for_autocast
from moe_kernels.ops.expert_sum import expert_sum, index_sum


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    rows: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Applies each expert's linear map to its rows of a batch sorted by expert.

    Args:
        x: [N, in], rows sorted by expert; with `rows`, [T, in] in any order.
        weight: [E, out, in].
        bias: [E, out] or None.
        offsets: int32 [E + 1]; rows offsets[e] to offsets[e + 1] belong to expert e.
        rows: int32 [N]; sorted row j reads x[rows[j]], gathered inside the kernel.
        backend: None for the fastest on x's device, or "reference".

    Returns:
        [N, out].

    Raises:
        ValueError: if a shape, dtype or device does not match.
    """
    check.ndim("x", x, 2)
    check.ndim("weight", weight, 3)
    check.shape("weight", weight, (None, None, x.shape[1]), "[E, out, in] with in = x.shape[1]")
    check.same_kind("weight", weight, "x", x)
    if bias is not None:
        check.shape("bias", bias, tuple(weight.shape[:2]), "[E, out]")
        check.same_kind("bias", bias, "x", x)
    check.offsets(offsets, weight.shape[0], x)
    if rows is not None:
        check.indices("rows", rows, x, ndim=1)
    x, weight, bias = cast_for_autocast(x, weight, bias)
    return backends.choose("expert_linear", backend, x)(x, weight, bias, offsets, rows)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, rows: Tensor | None) -> Tensor:
    return x.new_empty((x if rows is None else rows).shape[0], weight.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, offsets, rows = inputs
    x_needs, weight_needs = ctx.needs_input_grad[:2]
    ctx.num_rows = x.shape[0]
    ctx.save_for_backward(x if weight_needs else None, weight if x_needs else None, offsets, rows)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets, rows = ctx.saved_tensors
    x_needs, weight_needs, bias_needs = ctx.needs_input_grad[:3]
    dx = dweight = dbias = None
    if x_needs:
        dx = expert_linear_unchecked(grad, weight.transpose(1, 2), None, offsets, None)
        if rows is not None:
            dx = index_sum(dx, rows, ctx.num_rows)
    if weight_needs:
        dweight = expert_linear_weight_grad(grad, x, offsets, rows)
    if bias_needs:
        dbias = expert_sum(grad, offsets)
    return dx, dweight, dbias, None, None


expert_linear_unchecked = define(
    "expert_linear(Tensor x, Tensor weight, Tensor? bias, Tensor offsets, Tensor? rows) -> Tensor",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
    triton="expert_linear",
)


def _weight_grad_fake(grad: Tensor, x: Tensor, offsets: Tensor, rows: Tensor | None) -> Tensor:
    return grad.new_empty(offsets.shape[0] - 1, grad.shape[1], x.shape[1])


def _weight_grad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, offsets, rows = inputs
    grad_needs, x_needs = ctx.needs_input_grad[:2]
    ctx.num_rows = x.shape[0]
    ctx.save_for_backward(grad if x_needs else None, x if grad_needs else None, offsets, rows)


def _weight_grad_backward(ctx: Any, ddweight: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, offsets, rows = ctx.saved_tensors
    dgrad = dx = None
    if ctx.needs_input_grad[0]:
        dgrad = expert_linear_unchecked(x, ddweight, None, offsets, rows)
    if ctx.needs_input_grad[1]:
        dx = expert_linear_unchecked(grad, ddweight.transpose(1, 2), None, offsets, None)
        if rows is not None:
            dx = index_sum(dx, rows, ctx.num_rows)
    return dgrad, dx, None, None


expert_linear_weight_grad = define(
    "expert_linear_weight_grad(Tensor grad, Tensor x, Tensor offsets, Tensor? rows) -> Tensor",
    _weight_grad_fake,
    setup_context=_weight_grad_setup_context,
    backward=_weight_grad_backward,
    triton="expert_linear_weight_grad",
)
