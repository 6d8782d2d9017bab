"""Grouped 2D convolution: image j of expert e becomes conv2d(x[j], weight[e]) + bias[e]."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_kernels import _checks as check
from moe_kernels import backends
from moe_kernels._layout import channels_innermost, memory_format
from moe_kernels._library import define
from moe_kernels._torch import autocast_dtype, autocast_is_on, cast_for_autocast
from moe_kernels.ops.expert_sum import expert_sum


def expert_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Convolves each expert's images of a batch sorted by expert with that expert's kernels.

    Args:
        x: [N, C, H, W], images sorted by expert; contiguous or channels-last, which the output keeps.
        weight: [E, O, C, kh, kw].
        bias: [E, O] or None.
        offsets: int32 [E + 1]; images offsets[e] to offsets[e + 1] belong to expert e.
        stride: step between outputs, in pixels, one number or (vertical, horizontal).
        padding: zeros added on each side, in pixels, one number or (vertical, horizontal).
        backend: None for the fastest on x's device, or "reference".

    Returns:
        [N, O, (H + 2 padding - kh) // stride + 1, (W + 2 padding - kw) // stride + 1].

    Raises:
        ValueError: if a shape, dtype, device, stride or padding does not match.
    """
    check.ndim("x", x, 4)
    check.ndim("weight", weight, 5)
    check.shape("weight", weight, (None, None, x.shape[1], None, None), "[E, O, C, kh, kw] with C = x.shape[1]")
    check.channels(weight)
    check.same_kind("weight", weight, "x", x)
    if bias is not None:
        check.shape("bias", bias, tuple(weight.shape[:2]), "[E, O]")
        check.same_kind("bias", bias, "x", x)
    check.offsets(offsets, weight.shape[0], x)
    strides, paddings = check.pair("stride", stride, 1), check.pair("padding", padding, 0)
    check_kernel(x, weight, paddings)
    if x.is_cuda and autocast_is_on("cuda"):  # casts the weight and changes its layout in one pass
        weight = channels_innermost(weight, autocast_dtype(weight))
    x, weight, bias = cast_for_autocast(x, weight, bias)
    return backends.choose("expert_conv2d", backend, x)(x, weight, bias, offsets, strides, paddings)


def check_kernel(x: Tensor, weight: Tensor, padding: Sequence[int]) -> None:
    """Of images [N, C, H, W] and kernels [..., kh, kw]."""
    for size, kernel, pad in zip(x.shape[2:], weight.shape[-2:], padding, strict=True):
        if not 1 <= kernel <= size + 2 * pad:
            raise ValueError(
                f"weight must have kernels of at least 1 x 1 that are no larger than the padded image, here "
                f"x {list(x.shape)} with padding {list(padding)}, got shape {list(weight.shape)}"
            )


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, stride: list[int], padding: list[int]
) -> Tensor:
    height, width = (
        (size + 2 * p - kernel) // s + 1
        for size, kernel, s, p in zip(x.shape[2:], weight.shape[3:], stride, padding, strict=True)
    )
    return empty_images(x, x.shape[0], weight.shape[1], height, width)


def empty_images(like: Tensor, *shape: int) -> Tensor:
    """Uninitialized images in the memory format of `like`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, offsets, ctx.stride, ctx.padding = inputs
    x_needs, weight_needs = ctx.needs_input_grad[:2]
    ctx.size, ctx.kernel = x.shape[2:], weight.shape[3:]
    ctx.save_for_backward(x if weight_needs else None, weight if x_needs else None, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets = ctx.saved_tensors
    x_needs, weight_needs, bias_needs = ctx.needs_input_grad[:3]
    dx = dweight = dbias = None
    if x_needs:
        dx = _input_grad(grad, weight, offsets, *ctx.size, ctx.stride, ctx.padding)
    if weight_needs:
        dweight = _weight_grad(grad, x, offsets, *ctx.kernel, ctx.stride, ctx.padding)
    if bias_needs:
        dbias = expert_sum(grad.sum((2, 3)), offsets)
    return dx, dweight, dbias, None, None, None


_expert_conv2d = define(
    "expert_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor offsets, int[2] stride, int[2] padding) -> Tensor",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
    triton="expert_conv2d",
)


def _input_grad_fake(
    grad: Tensor, weight: Tensor, offsets: Tensor, height: int, width: int, stride: list[int], padding: list[int]
) -> Tensor:
    return empty_images(grad, grad.shape[0], weight.shape[2], height, width)


def _input_grad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, offsets, _, _, ctx.stride, ctx.padding = inputs
    grad_needs, weight_needs = ctx.needs_input_grad[:2]
    ctx.kernel = weight.shape[3:]
    ctx.save_for_backward(grad if weight_needs else None, weight if grad_needs else None, offsets)


def _input_grad_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    grad, weight, offsets = ctx.saved_tensors
    dgrad = dweight = None
    if ctx.needs_input_grad[0]:
        dgrad = _expert_conv2d(ddx, weight, None, offsets, ctx.stride, ctx.padding)
    if ctx.needs_input_grad[1]:
        dweight = _weight_grad(grad, ddx, offsets, *ctx.kernel, ctx.stride, ctx.padding)
    return dgrad, dweight, None, None, None, None, None


_input_grad = define(
    "expert_conv2d_input_grad(Tensor grad, Tensor weight, Tensor offsets, SymInt height, SymInt width, "
    "int[2] stride, int[2] padding) -> Tensor",
    _input_grad_fake,
    setup_context=_input_grad_setup_context,
    backward=_input_grad_backward,
    triton="expert_conv2d",
)


def _weight_grad_fake(
    grad: Tensor, x: Tensor, offsets: Tensor, height: int, width: int, stride: list[int], padding: list[int]
) -> Tensor:
    return grad.new_empty(offsets.shape[0] - 1, grad.shape[1], x.shape[1], height, width)


def _weight_grad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, offsets, _, _, ctx.stride, ctx.padding = inputs
    grad_needs, x_needs = ctx.needs_input_grad[:2]
    ctx.size = x.shape[2:]
    ctx.save_for_backward(grad if x_needs else None, x if grad_needs else None, offsets)


def _weight_grad_backward(ctx: Any, ddweight: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, offsets = ctx.saved_tensors
    dgrad = dx = None
    if ctx.needs_input_grad[0]:
        dgrad = _expert_conv2d(x, ddweight, None, offsets, ctx.stride, ctx.padding)
    if ctx.needs_input_grad[1]:
        dx = _input_grad(grad, ddweight, offsets, *ctx.size, ctx.stride, ctx.padding)
    return dgrad, dx, None, None, None, None, None


_weight_grad = define(
    "expert_conv2d_weight_grad(Tensor grad, Tensor x, Tensor offsets, SymInt height, SymInt width, "
    "int[2] stride, int[2] padding) -> Tensor",
    _weight_grad_fake,
    setup_context=_weight_grad_setup_context,
    backward=_weight_grad_backward,
    triton="expert_conv2d_weight_grad",
)
