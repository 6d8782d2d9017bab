"""ReLU that saves one bit per element for its backward: y = max(x, 0), dx = dy * [not x <= 0]."""

from typing import Any

import torch
from torch import Tensor

from moe_kernels import _checks as check
from moe_kernels import backends
from moe_kernels._layout import memory_format
from moe_kernels._library import define


def mask_relu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """torch.relu, NaN handling included, that saves ceil(numel / 8) bytes for its backward instead of its output.

    Args:
        x: any shape, floating point; contiguous or channels-last, which the output keeps.
        backend: None for the fastest on x's device, or "reference".

    Returns:
        A tensor with the shape and dtype of x.

    Raises:
        ValueError: if x is not a floating-point tensor.
    """
    check.floating("x", x)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return torch.relu(x)
    return backends.choose("mask_relu_forward", backend, x)(x)[0]


# ReLU, with these as they are; hardtanh, with other bounds; leaky ReLU, with a slope.
_RECTIFIER = "float low=0, float? high=None, float? slope=None"


def _forward_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return y, x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def _forward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    (x, *_, ctx.slope), bits = inputs, output[1]
    ctx.channels_last = memory_format(x) == torch.channels_last
    ctx.mark_non_differentiable(bits)
    ctx.save_for_backward(bits)


def _forward_backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, None, None, None]:
    (bits,) = ctx.saved_tensors
    return _backward(grad, bits, ctx.channels_last, ctx.slope), None, None, None


mask_relu_forward = define(
    f"mask_relu_forward(Tensor x, {_RECTIFIER}) -> (Tensor, Tensor)",
    _forward_fake,
    setup_context=_forward_setup_context,
    backward=_forward_backward,
)

"""`reference.mask_relu_forward`, and the gradient of x for that of y."""

mask_relu_forward_ = define(
    f"mask_relu_forward_(Tensor(a!) x, {_RECTIFIER}) -> Tensor",
    lambda x, *_: x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8),
)
"""`mask_relu_forward` that overwrites x, which must be contiguous or channels-last, with y, and returns the bits. Not
differentiable by itself, and x keeps its version: both are up to the caller."""


def _backward_fake(grad: Tensor, bits: Tensor, channels_last: bool, *_: Any) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device, memory_format=layout)


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bits, ctx.channels_last, ctx.slope = inputs
    ctx.save_for_backward(bits)


def _backward_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor, None, None, None]:
    (bits,) = ctx.saved_tensors
    return _backward(ddx, bits, ctx.channels_last, ctx.slope), None, None, None


_backward = define(
    "mask_relu_backward(Tensor grad, Tensor bits, bool channels_last, float? slope=None) -> Tensor",
    _backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
)
