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


def _forward_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return y, x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def _forward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    bits = output[1]
    ctx.channels_last = memory_format(inputs[0]) == torch.channels_last
    ctx.mark_non_differentiable(bits)
    ctx.save_for_backward(bits)


def _forward_backward(ctx: Any, grad: Tensor, _: None) -> Tensor:
    (bits,) = ctx.saved_tensors
    return _backward(grad, bits, ctx.channels_last)


_forward = define(
    "mask_relu_forward(Tensor x) -> (Tensor, Tensor)",
    _forward_fake,
    setup_context=_forward_setup_context,
    backward=_forward_backward,
)


def _backward_fake(grad: Tensor, bits: Tensor, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device, memory_format=layout)


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bits, ctx.channels_last = inputs
    ctx.save_for_backward(bits)


def _backward_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor, None, None]:
    (bits,) = ctx.saved_tensors
    return _backward(ddx, bits, ctx.channels_last), None, None


_backward = define(
    "mask_relu_backward(Tensor grad, Tensor bits, bool channels_last) -> Tensor",
    _backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
)
