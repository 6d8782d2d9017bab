"""What operations with frozen weights keep for their input gradient, in place of what torch would keep.

Each rule is for an operation that is piecewise linear in its input: the input gradient depends on the piece (a bit, an
index) but not on the input itself, so differentiating the backward again gives the true second derivatives.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels._layout import memory_format
from moe_kernels._library import OPERATORS
from moe_kernels._torch import autocast_dtype, autocast_is_on
from moe_kernels.attacks.autograd import Rule, Size, blank_like, each, lean
from moe_kernels.attacks.pooling import POOLINGS
from moe_kernels.backends import is_implemented
from moe_kernels.ops.winograd_conv2d import is_emulated, saves_work

aten = torch.ops.aten

# Smaller inputs are kept as by torch, and convolutions of fewer products left to it: calls in Python would cost more.
MIN_ELEMENTS, MIN_PRODUCTS = 2**18, 2**25


def is_small(rule: Rule, x: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether the sizes of x and the weight alone show that the rule would not pay for itself."""
    if rule is not convolution or len(args) < 2 or x.ndim < 3 or x.numel() >= MIN_ELEMENTS:
        return x.numel() < MIN_ELEMENTS and rule is not convolution
    of_channel, outputs = x.numel() // max(1, x.shape[1]), len(args[1])
    return of_channel * outputs < MIN_ELEMENTS and 9 * x.numel() * outputs < MIN_PRODUCTS


def convolution(
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    pixels, sides = _pixels(padding, weight, dilation), input.ndim - 2
    if pixels is None or input.ndim != weight.ndim:
        return NotImplemented
    strides, pixels = each(stride, sides), each(pixels, sides)
    if len(strides) != sides or len(pixels) != sides or min(strides) < 1 or min(pixels) < 0:
        return NotImplemented  # torch says what is wrong
    if weight.shape[2:] == (3, 3) and groups == 1 and each(dilation, 2) == [1, 1]:
        height, width = input.shape[2:]
        much = len(input) * height * width * weight.numel() >= MIN_PRODUCTS
        if much and saves_work(input, weight, strides, pixels) and _fits_winograd(input, weight, bias):
            return _by_winograd(input, weight, bias, pixels)
    coming_out = input.numel() // max(1, input.shape[1]) * len(weight) // math.prod(strides)
    if max(input.numel(), coming_out) < MIN_ELEMENTS:
        return NotImplemented
    # Kernels of one pixel read every stride-th pixel: of contiguous images oneDNN takes long to find this out.
    one_pixel = weight.shape[1:] == (input.shape[1], *[1] * sides) and not max(pixels)
    if one_pixel and max(strides) > 1 and input.device.type == "cpu" and input.is_contiguous():
        read: Any = (..., *(slice(None, None, step) for step in strides))
        input, strides = input[read], [1] * sides
    settings = (strides, pixels, dilation, False, 0, groups)
    return _lean_convolution(
        input, weight, lambda x: func(x, weight, bias, strides, padding, dilation, groups), *settings
    )


def _fits_winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether torch would accept these tensors, and they are dense."""
    others, dtype = [weight] if bias is None else [weight, bias], autocast_dtype(x)
    return (
        all(t.device == x.device and autocast_dtype(t) == dtype for t in others)
        and x.shape[1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and all(t.is_contiguous(memory_format=memory_format(t)) for t in (x, weight))
    )


def _by_winograd(x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    """The convolution and its input gradient as those of one expert, in channels-last if torch's result would be."""
    last = torch.channels_last in (memory_format(x), memory_format(weight))
    layout, dtype = torch.channels_last if last else torch.contiguous_format, autocast_dtype(x)
    convolve, opposite = OPERATORS["winograd_conv2d"], [2 - pixels for pixels in padding]
    offsets, shift = _of_one_expert(len(x)), None if bias is None else bias[None].to(weight.dtype)

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        x = x.to(weight.dtype).contiguous(memory_format=layout)
        return convolve(x, weight[None], shift, offsets, padding, False).to(dtype), (weight,)

    def backward(grad: Tensor, weight: Tensor) -> Tensor:
        grad = grad.to(weight.dtype).contiguous(memory_format=layout)
        return convolve(grad, weight[None], None, offsets, opposite, True)

    return lean(x, forward, backward)


@functools.lru_cache(16)
def _of_one_expert(rows: int) -> Tensor:
    """Offsets that give all rows to a single expert, on the CPU."""
    return torch.tensor([0, rows], dtype=torch.int32)


def _pixels(padding: Size | str, weight: Tensor, dilation: Size) -> Size | None:
    """The padding of a side in pixels, or None if two opposite sides differ."""
    if not isinstance(padding, str):
        return padding
    both = [d * (k - 1) for d, k in zip(each(dilation, weight.ndim - 2), weight.shape[2:], strict=True)]
    if padding == "valid":
        return 0
    return None if any(pixels % 2 for pixels in both) else [pixels // 2 for pixels in both]


def _transposed_convolution(
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    if input.ndim != weight.ndim:
        return NotImplemented
    settings = (stride, padding, dilation, True, output_padding, groups)
    return _lean_convolution(
        input, weight, lambda x: func(x, weight, bias, stride, padding, output_padding, groups, dilation), *settings
    )


def _lean_convolution(
    x: Tensor,
    weight: Tensor,
    convolve: Callable[[Tensor], Tensor],
    stride: Size,
    padding: Size,
    dilation: Size,
    transposed: bool,
    output_padding: Size,
    groups: int,
) -> Tensor:
    blank, sizes = blank_like(x), (each(size, x.ndim - 2) for size in (stride, padding, dilation, output_padding))
    stride, padding, dilation, output_padding = sizes
    settings = (stride, padding, dilation, transposed, output_padding, groups, [True, False, False])
    dtype, device = autocast_dtype(x), x.device.type
    emulated = autocast_is_on(device) and is_emulated(x)  # slower than fp32 with a rounded result

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        if not emulated:
            return convolve(x), (weight,)
        with torch.autocast(device, enabled=False):
            return convolve(x.to(weight.dtype)).to(dtype), (weight,)

    def backward(grad: Tensor, weight: Tensor) -> Tensor:
        grad = grad.to(weight.dtype) if emulated else grad
        return aten.convolution_backward(grad, blank(grad), weight.to(grad.dtype), None, *settings)[0]

    return lean(x, forward, backward)


def _linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # Only under autocast does torch keep more than this rule, a cast copy of the weight.
    if weight.ndim != 2 or not autocast_is_on(input.device.type):
        return NotImplemented

    def backward(grad: Tensor, weight: Tensor) -> Tensor:
        return (grad.reshape(-1, grad.shape[-1]) @ weight.to(grad.dtype)).view(input_shape)

    input_shape = input.shape
    return lean(input, lambda x: (func(x, weight, bias), (weight,)), backward)


def _batch_norm(
    func: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        return NotImplemented

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        return func(x, running_mean, running_var, weight, bias, False, momentum, eps), (running_var, weight)

    def backward(grad: Tensor, running_var: Tensor, weight: Tensor | None) -> Tensor:
        shape = (-1, *[1] * (grad.ndim - 2))
        dtype = torch.promote_types(running_var.dtype, torch.float32)
        scale = (running_var.double() + eps).rsqrt().to(dtype)
        dx = grad * scale.view(shape)
        return dx if weight is None else dx.mul_(weight.view(shape))

    return lean(input, forward, backward)


def _relu(func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    return _rectified(input, inplace, 0.0, None, None)


def _leaky_relu(func: Any, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    if not (_are_numbers(input, negative_slope) and negative_slope >= 0):
        return NotImplemented
    return _rectified(input, inplace, 0.0, None, negative_slope)


def _hardtanh(func: Any, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    if not (_are_numbers(input, min_val, max_val) and min_val <= max_val):
        return NotImplemented
    return _rectified(input, inplace, min_val, max_val, None)


def _relu6(func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    return _rectified(input, inplace, 0.0, 6.0, None)


def _are_numbers(x: Tensor, *values: object) -> bool:
    """Whether torch would surely take these values beside x, and they are finite."""
    return all(isinstance(value, int | float) and abs(value) <= torch.finfo(x.dtype).max for value in values)


def _rectified(x: Tensor, inplace: bool, low: float, high: float | None, slope: float | None) -> Tensor:
    """`reference.mask_relu_forward` of a tensor that fills its memory, in whatever order its dimensions have there."""
    layout, order = memory_format(x), sorted(range(x.ndim), key=x.stride, reverse=True)
    if not (is_implemented("mask_relu_forward", x.device.type) and x.permute(order).is_contiguous()):
        return NotImplemented
    usual = x.is_contiguous(memory_format=layout)

    def forward(x: Tensor, inplace: bool = False) -> tuple[Tensor, tuple[Tensor]]:
        if usual and not inplace:
            y, bits = OPERATORS["mask_relu_forward"](x, low, high, slope)
            return y, (bits,)
        y = x if inplace else x.clone()
        return y, (OPERATORS["mask_relu_forward_"](y.permute(order), low, high, slope),)

    def backward(grad: Tensor, bits: Tensor) -> Tensor:
        if usual:
            return OPERATORS["mask_relu_backward"](grad, bits, layout == torch.channels_last, slope)
        dx = OPERATORS["mask_relu_backward"](grad.permute(order), bits, False, slope)
        return dx.permute([order.index(i) for i in range(dx.ndim)])

    return lean(x, forward, backward, inplace)


# A rule takes the torch function itself and its arguments; NotImplemented leaves the call to torch.
RULES: dict[Any, Rule] = {
    **dict.fromkeys([F.conv1d, F.conv2d, F.conv3d], convolution),
    **dict.fromkeys([F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d], _transposed_convolution),
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    **dict.fromkeys([F.relu, torch.relu, Tensor.relu], _relu),
    **dict.fromkeys([torch.relu_, Tensor.relu_], functools.partial(_relu, inplace=True)),
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: functools.partial(_leaky_relu, inplace=True),
    F.hardtanh: _hardtanh,
    F.hardtanh_: functools.partial(_hardtanh, inplace=True),
    F.relu6: _relu6,
    **POOLINGS,
}
