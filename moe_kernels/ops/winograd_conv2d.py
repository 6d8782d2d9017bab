"""Grouped 3 x 3 convolution of stride 1 by Winograd's algorithm: fewer products, more rounding (docs/facts.md)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_kernels import _checks as check
from moe_kernels import _library, backends
from moe_kernels._library import define
from moe_kernels._torch import autocast_dtype, cast_for_autocast, cpu_multiplies_bf16
from moe_kernels.ops.expert_conv2d import empty_images
from moe_kernels.ops.expert_sum import expert_sum

WIDE = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = WIDE[:1] if cpu_multiplies_bf16() else WIDE  # that the CPU multiplies no faster than float32
TILE = 4  # results per side
# From where on Winograd's algorithm was measured to be faster than oneDNN (docs/facts.md), by level of the CPU library:
# the least number of tiles per expert with fewer than 64 channels, the same with 64 or more, and the largest ratio of
# its number of products to that of a direct convolution.
LIMITS = {"x86-64-v4": (8, 4, 0.5)}
DEFAULT_LIMITS = (9, 9, 0.35)


def winograd_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    padding: int | Sequence[int] = 0,
    *,
    backend: str | None = None,
) -> Tensor:
    """`expert_conv2d` with 3 x 3 kernels and stride 1 by F(4 x 4, 3 x 3) of Lavin and Gray, "Fast Algorithms for
    Convolutional Neural Networks", CVPR 2016, with the points 0, +-2/3, +-3/2 and infinity.

    16-bit input is computed in fp32. A NaN or infinite pixel makes all 4 x 4 results NaN of every tile that reads it.
    Gradients are computed in the same way.

    Args:
        x: [N, C, H, W], images sorted by expert; float32, bfloat16 or float16; contiguous or channels-last, which the
            output keeps.
        weight: [E, O, C, 3, 3].
        bias: [E, O] or None.
        offsets: int32 [E + 1]; images offsets[e] to offsets[e + 1] belong to expert e.
        padding: zeros added on each side, 0, 1 or 2 pixels, one number or (vertical, horizontal).
        backend: None for the fastest on x's device, or "reference".

    Returns:
        [N, O, H + 2 padding - 2, W + 2 padding - 2].

    Raises:
        ValueError: if a shape, dtype, device or padding does not match.
    """
    check.ndim("x", x, 4)
    check.shape("weight", weight, (None, None, x.shape[1], 3, 3), "[E, O, C, 3, 3] with C = x.shape[1]")
    check.channels(weight)
    check.same_kind("weight", weight, "x", x)
    if bias is not None:
        check.shape("bias", bias, tuple(weight.shape[:2]), "[E, O]")
        check.same_kind("bias", bias, "x", x)
    check.offsets(offsets, weight.shape[0], x)
    paddings = check.pair("padding", padding, 0)
    if max(paddings) > 2 or min(size + 2 * pad for size, pad in zip(x.shape[2:], paddings, strict=True)) < 3:
        raise ValueError(
            f"padding must be at most 2 and make x {list(x.shape)} at least 3 pixels high and wide, got {paddings}"
        )
    x, weight, bias = cast_for_autocast(x, weight, bias)
    return backends.choose("winograd_conv2d", backend, x)(x, weight, bias, offsets, paddings, False)


def saves_work(x: Tensor, weight: Tensor, stride: int | Sequence[int], padding: int | Sequence[int]) -> bool:
    """Whether `winograd_conv2d` can convolve x with this weight [..., O, C, kh, kw] on x's device, and faster than the
    vendor's convolution. It takes 36 products per tile of 16 results, some of which may lie beyond the edge, instead of
    9 per result, and transforms the weight once for all tiles of an expert."""
    known = x.ndim == 4 and autocast_dtype(x) in DTYPES
    if not (known and backends.is_implemented("winograd_conv2d", x.device.type)):
        return False
    strides, paddings = check.pair("stride", stride, 1), check.pair("padding", padding, 0)
    height, width = (size + 2 * p - 2 for size, p in zip(x.shape[2:], paddings, strict=True))
    tiles, channels = -(-height // TILE) * -(-width // TILE), min(weight.shape[-4:-2])
    experts = len(weight) if weight.ndim == 5 else 1
    few_channels, many_channels, most_products = LIMITS.get(_library.level, DEFAULT_LIMITS)
    return (
        (*weight.shape[-2:], *strides) == (3, 3, 1, 1)
        and max(paddings) <= 2
        and channels >= 16
        and len(x) * tiles >= experts * (few_channels if channels < 64 else many_channels)
        and 36 * tiles <= most_products * 9 * height * width
    )


def is_emulated(x: Tensor) -> bool:
    """Whether x is convolved in a 16-bit dtype, its own or autocast's, that its CPU has to emulate."""
    return x.device.type == "cpu" and autocast_dtype(x) in DTYPES[1:]


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, padding: list[int], transposed: bool
) -> Tensor:
    height, width = (size + 2 * p - 2 for size, p in zip(x.shape[2:], padding, strict=True))
    return empty_images(x, x.shape[0], weight.shape[2 if transposed else 1], height, width)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, offsets, ctx.padding, ctx.transposed = inputs
    x_needs, weight_needs = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if weight_needs else None, weight if x_needs else None, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets = ctx.saved_tensors
    x_needs, weight_needs, bias_needs = ctx.needs_input_grad[:3]
    opposite = [2 - p for p in ctx.padding]
    dx = dweight = dbias = None
    if x_needs:
        dx = _winograd_conv2d(grad, weight, None, offsets, opposite, not ctx.transposed)
    if weight_needs:
        pair, padding = ((x, grad), opposite) if ctx.transposed else ((grad, x), ctx.padding)
        dweight = _weight_grad(*pair, offsets, padding)
    if bias_needs:
        dbias = expert_sum(grad.sum((2, 3)), offsets)
    return dx, dweight, dbias, None, None, None


# `transposed`: the kernels are rotated by 180 degrees, and O and C are swapped, as the input gradient needs.
_winograd_conv2d = define(
    "winograd_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor offsets, int[2] padding, bool transposed) -> Tensor",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _weight_grad_fake(grad: Tensor, x: Tensor, offsets: Tensor, padding: list[int]) -> Tensor:
    return grad.new_empty(offsets.shape[0] - 1, grad.shape[1], x.shape[1], 3, 3)


def _weight_grad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, offsets, ctx.padding = inputs
    grad_needs, x_needs = ctx.needs_input_grad[:2]
    ctx.save_for_backward(grad if x_needs else None, x if grad_needs else None, offsets)


def _weight_grad_backward(ctx: Any, ddweight: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, offsets = ctx.saved_tensors
    dgrad = dx = None
    if ctx.needs_input_grad[0]:
        dgrad = _winograd_conv2d(x, ddweight, None, offsets, ctx.padding, False)
    if ctx.needs_input_grad[1]:
        dx = _winograd_conv2d(grad, ddweight, None, offsets, [2 - p for p in ctx.padding], True)
    return dgrad, dx, None, None


_weight_grad = define(
    "winograd_conv2d_weight_grad(Tensor grad, Tensor x, Tensor offsets, int[2] padding) -> Tensor",
    _weight_grad_fake,
    setup_context=_weight_grad_setup_context,
    backward=_weight_grad_backward,
)
