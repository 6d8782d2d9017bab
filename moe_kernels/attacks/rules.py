"""What operations with frozen weights keep for their input gradient, in place of what torch would keep.

Every rule below belongs to operations that are linear in their input, piece by piece: the input gradient needs to know
the piece (a bit, an index) but not the input, so that second derivatives are those of the backward, and real.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels import _checks as check
from moe_kernels._layout import memory_format
from moe_kernels._library import OPERATORS
from moe_kernels.backends import is_implemented
from moe_kernels.ops.winograd_conv2d import is_emulated, saves_work

Size = int | Sequence[int]
Rule = Callable[..., Tensor]

aten = torch.ops.aten

# An input of fewer elements is kept, and a convolution of fewer products left to torch: calls in Python take longer.
FEW, LITTLE = 2**18, 2**25


class _Lean(torch.autograd.Function):
    """y, kept = forward(x), whose gradient is backward(grad, *kept) in the dtype of x; `written`: y takes x's place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable[..., Any], backward: Callable[..., Tensor], written: bool = False
    ) -> Tensor:
        y, kept = forward(x)
        ctx.save_for_backward(*kept)
        ctx.input_gradient, ctx.dtype = backward, x.dtype
        if not written:
            return y
        ctx.mark_dirty(x)
        return x.copy_(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.input_gradient(grad, *ctx.saved_tensors).to(ctx.dtype), None, None, None


def _lean(x: Tensor, forward: Callable[..., Any], backward: Callable[..., Tensor], inplace: bool) -> Tensor:
    """The same, in place where torch would allow it."""
    if inplace and (x.is_leaf or x._is_view()):
        return NotImplemented if x.is_leaf else x.copy_(_Lean.apply(x, forward, backward))
    return _Lean.apply(x, forward, backward, inplace)


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
    pixels = _pixels(padding, weight, dilation)
    if pixels is None or input.ndim != weight.ndim:
        return NotImplemented
    if weight.shape[2:] == (3, 3) and groups == 1 and each(dilation, 2) == [1, 1]:
        height, width = input.shape[2:]
        much = len(input) * height * width * weight.numel() >= LITTLE
        if much and saves_work(input, weight, stride, pixels) and _fits_winograd(input, weight, bias):
            return _by_winograd(input, weight, bias, each(pixels, 2))
    channels = max(1, input.shape[1])
    if input.numel() // channels * max(channels, weight.shape[0]) < FEW:  # going in, or, but for strides, coming out
        return NotImplemented
    settings = (stride, pixels, dilation, False, 0, groups)
    return _lean_convolution(
        input, weight, lambda x: func(x, weight, bias, stride, padding, dilation, groups), *settings
    )


def _fits_winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether torch, too, would take these tensors, and they are dense."""
    others, dtype = [weight] if bias is None else [weight, bias], check.autocast_dtype(x)
    return (
        all(t.device == x.device and check.autocast_dtype(t) == dtype for t in others)
        and x.shape[1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and all(t.is_contiguous(memory_format=memory_format(t)) for t in (x, weight))
    )


def _by_winograd(x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    """The convolution and its gradient, as of a single expert, in channels-last where torch would answer so."""
    last = torch.channels_last in (memory_format(x), memory_format(weight))
    layout, dtype = torch.channels_last if last else torch.contiguous_format, check.autocast_dtype(x)
    convolve, opposite = OPERATORS["winograd_conv2d"], [2 - pixels for pixels in padding]
    offsets, shift = _of_one_expert(len(x)), None if bias is None else bias[None].to(weight.dtype)

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        x = x.to(weight.dtype).contiguous(memory_format=layout)
        return convolve(x, weight[None], shift, offsets, padding, False).to(dtype), (weight,)

    def backward(grad: Tensor, weight: Tensor) -> Tensor:
        grad = grad.to(weight.dtype).contiguous(memory_format=layout)
        return convolve(grad, weight[None], None, offsets, opposite, True)

    return _Lean.apply(x, forward, backward)


@functools.lru_cache(16)
def _of_one_expert(rows: int) -> Tensor:
    """Its offsets, on the CPU."""
    return torch.tensor([0, rows], dtype=torch.int32)


def _pixels(padding: Size | str, weight: Tensor, dilation: Size) -> Size | None:
    """The padding of each side in pixels, or None where its two sides differ."""
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
    blank, sizes = _blank(x), (each(size, x.ndim - 2) for size in (stride, padding, dilation, output_padding))
    stride, padding, dilation, output_padding = sizes
    settings = (stride, padding, dilation, transposed, output_padding, groups, [True, False, False])
    dtype, device = check.autocast_dtype(x), x.device.type
    emulated = check.autocast_is_on(device) and is_emulated(x)  # and slower than fp32, whose result is rounded instead

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        if not emulated:
            return convolve(x), (weight,)
        with torch.autocast(device, enabled=False):
            return convolve(x.to(weight.dtype)).to(dtype), (weight,)

    def backward(grad: Tensor, weight: Tensor) -> Tensor:
        grad = grad.to(weight.dtype) if emulated else grad
        return aten.convolution_backward(grad, blank(grad), weight.to(grad.dtype), None, *settings)[0]

    return _Lean.apply(x, forward, backward)


def _linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # Autocast has torch keep a cast copy of the weight.
    if weight.ndim != 2 or not check.autocast_is_on(input.device.type):
        return NotImplemented

    def backward(grad: Tensor, weight: Tensor) -> Tensor:
        return (grad.reshape(-1, grad.shape[-1]) @ weight.to(grad.dtype)).view(input_shape)

    input_shape = input.shape
    return _Lean.apply(input, lambda x: (func(x, weight, bias), (weight,)), backward)


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

    return _Lean.apply(input, forward, backward)


def _relu(func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    layout = memory_format(input)
    if not (input.is_contiguous(memory_format=layout) and is_implemented("mask_relu_forward", input.device.type)):
        return _piecewise(input, torch.relu, lambda x: ~(x <= 0), 0, inplace)

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        y, bits = OPERATORS["mask_relu_forward"](x)
        return y, (bits,)

    def backward(grad: Tensor, bits: Tensor) -> Tensor:
        return OPERATORS["mask_relu_backward"](grad, bits, layout == torch.channels_last)

    return _lean(input, forward, backward, inplace)


def _relu_(func: Any, input: Tensor) -> Tensor:
    return _relu(func, input, True)


def _leaky_relu(func: Any, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    return _piecewise(input, lambda x: F.leaky_relu(x, negative_slope), lambda x: x > 0, negative_slope, inplace)


def _leaky_relu_(func: Any, input: Tensor, negative_slope: float = 0.01) -> Tensor:
    return _leaky_relu(func, input, negative_slope, True)


def _hardtanh(func: Any, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    def passes(x: Tensor) -> Tensor:
        return ~((x <= min_val) | (x >= max_val))

    return _piecewise(input, lambda x: F.hardtanh(x, min_val, max_val), passes, 0, inplace)


def _hardtanh_(func: Any, input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    return _hardtanh(func, input, min_val, max_val, True)


def _relu6(func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    return _hardtanh(func, input, 0.0, 6.0, inplace)


def _piecewise(
    x: Tensor, function: Callable[[Tensor], Tensor], passes: Callable[[Tensor], Tensor], slope: float, inplace: bool
) -> Tensor:
    """function(x), whose derivative is 1 where passes(x), elsewhere slope; keeps one bit per element."""

    def backward(grad: Tensor, bits: Tensor) -> Tensor:
        shifts = torch.arange(8, device=bits.device)
        mask = (bits[:, None] >> shifts & 1).bool().flatten()[: grad.numel()].view(grad.shape)
        return torch.where(mask, grad, grad * slope if slope else 0)

    return _lean(x, lambda x: (function(x), (_packed(passes(x)),)), backward, inplace)


def _packed(mask: Tensor) -> Tensor:
    """bool, any shape -> uint8 [ceil(numel / 8)]."""
    bytes_ = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bytes_ << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


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
    """The first of pool(x), of which the second, int64 indices of pixels, is kept as narrow as it can be."""
    dtype = torch.int16 if math.prod(x.shape[2:]) < 2**15 else torch.int32
    blank = _blank(x)

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, indices = pool(x)
        return y, (indices.to(dtype),)

    def backward(grad: Tensor, indices: Tensor) -> Tensor:
        return pool_backward(grad, blank(grad), indices.long())

    return _Lean.apply(x, forward, backward)


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
    blank = _blank(input)
    return _Lean.apply(
        input, lambda x: (func(x, *settings), ()), lambda grad: pool_backward(grad, blank(grad), *settings)
    )


def _adaptive_avg_pool(func: Any, input: Tensor, output_size: Size | Sequence[int | None]) -> Tensor:
    n, pool_backward = _ADAPTIVE_AVG_POOLS[func]
    if input.ndim != n + 2 or each(output_size, n) == [1] * n:  # which torch computes as a mean
        return NotImplemented
    blank = _blank(input)
    return _Lean.apply(input, lambda x: (func(x, output_size), ()), lambda grad: pool_backward(grad, blank(grad)))


def _of_signals(rule: Rule, pool2d: Any) -> Rule:
    """The rule of a pooling of signals [B, C, L], which torch, too, takes for images of one row."""
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


def each(size: Any, n: int) -> list[Any]:
    """One number or n, as n."""
    sizes = list(size) if isinstance(size, tuple | list) else [int(size)]
    return sizes * n if len(sizes) == 1 else sizes


def _blank(x: Tensor) -> Callable[[Tensor], Tensor]:
    """Makes memory in x's shape and layout to stand for x where a backward reads no value of it."""
    shape, stride = x.shape, x.stride()
    return lambda grad: torch.empty_strided(shape, stride, dtype=grad.dtype, device=grad.device)


_OF_A_ROW = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "output_size": 1}  # heights
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
    F.adaptive_avg_pool2d: (2, aten._adaptive_avg_pool2d_backward),
    F.adaptive_avg_pool3d: (3, aten._adaptive_avg_pool3d_backward),
}

# A rule takes the torch function itself and its arguments; NotImplemented leaves the call to torch.
RULES: dict[Any, Rule] = {
    **dict.fromkeys([F.conv1d, F.conv2d, F.conv3d], convolution),
    **dict.fromkeys([F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d], _transposed_convolution),
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    **dict.fromkeys([F.relu, torch.relu, Tensor.relu], _relu),
    **dict.fromkeys([torch.relu_, Tensor.relu_], _relu_),
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: _leaky_relu_,
    F.hardtanh: _hardtanh,
    F.hardtanh_: _hardtanh_,
    F.relu6: _relu6,
    **dict.fromkeys(_MAX_POOLS, _max_pool),
    **dict.fromkeys([F.max_pool1d, torch.max_pool1d], _of_signals(_max_pool, F.max_pool2d)),
    **dict.fromkeys(_ADAPTIVE_MAX_POOLS, _adaptive_max_pool),
    F.adaptive_max_pool1d: _of_signals(_adaptive_max_pool, F.adaptive_max_pool2d),
    **dict.fromkeys(_AVG_POOLS, _avg_pool),
    F.avg_pool1d: _of_signals(_avg_pool, F.avg_pool2d),
    **dict.fromkeys(_ADAPTIVE_AVG_POOLS, _adaptive_avg_pool),
    F.adaptive_avg_pool1d: _of_signals(_adaptive_avg_pool, F.adaptive_avg_pool2d),
}
