"""Sums and products computed one term after the other, so that they round the same way on every machine."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels._torch import TorchDispatchMode

aten = torch.ops.aten


class InOrder(TorchDispatchMode):
    """Inside it, sums, matrix products and convolutions are computed as textbook loops: y = 0; y = y + a[k] b[k].

    Each product and each sum is rounded to the operands' dtype; with 16-bit operands to float32, and the result once
    more to 16 bits. A vendor's kernel sums in as many parts as its registers have lanes, which differ from CPU to CPU,
    so its error is no bound for that of another kernel.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        ours = _SUMS.get(func)
        if ours is None or not args[0].is_floating_point():
            return func(*args, **kwargs)
        dtype = kwargs.pop("dtype", None) or args[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        out = ours(*(a.to(wide) if isinstance(a, Tensor) else a for a in args), **kwargs)
        rounded = [y if y is None else y.to(dtype) for y in (out if isinstance(out, tuple) else (out,))]
        return tuple(rounded) if isinstance(out, tuple) else rounded[0]


def _sum(x: Tensor, dims: Any = None, keepdim: bool = False) -> Tensor:
    dims = sorted(d % x.ndim for d in (dims or range(x.ndim)))
    terms = x.movedim(dims, list(range(len(dims)))).flatten(0, len(dims) - 1) if dims else x[None]
    y = torch.zeros_like(terms[0]) if len(terms) else x.new_zeros(terms.shape[1:])
    for term in terms:
        y += term
    return y.view([1 if d in dims else size for d, size in enumerate(x.shape)]) if keepdim else y


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[..., M, K] @ [..., K, N] -> [..., M, N]"""
    y = a.new_zeros(*a.shape[:-1], b.shape[-1])
    for k in range(a.shape[-1]):
        y += a[..., k : k + 1] * b[..., k : k + 1, :]
    return y


def _sum_and_product(y: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * y + alpha * _product(a, b)


def _columns(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """[C kh kw, N pixels]"""
    return F.unfold(x, weight.shape[2:], dilation, padding, stride).transpose(0, 1).flatten(1)


def _check_plain(x: Tensor, transposed: bool, output_padding: Any, groups: int) -> None:
    if transposed or groups != 1 or x.ndim != 4:
        got = f"{x.ndim - 2} dimensions, groups={groups}, transposed={transposed}"
        raise ValueError(f"a convolution inside InOrder must be 2-D, in one group and not transposed, got {got}")


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, *rest: Any
) -> Tensor:
    _check_plain(x, *rest)
    like = F.conv2d(x.to("meta"), weight.to("meta"), None, stride, padding, dilation)
    y = _product(weight.flatten(1), _columns(x, weight, stride, padding, dilation))
    y = y.view(*like.transpose(0, 1).shape).transpose(0, 1)
    return y if bias is None else y + bias[:, None, None]


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, stride: Any, padding: Any, dilation: Any, *rest: Any
) -> tuple[Tensor | None, ...]:
    *others, needed = rest
    _check_plain(x, *others)
    g = grad.transpose(0, 1).flatten(1)  # [O, N pixels]
    dx = dweight = None
    if needed[0]:
        columns = _product(weight.flatten(1).T, g)
        columns = columns.view(len(columns), x.shape[0], math.prod(grad.shape[2:])).transpose(0, 1)
        dx = F.fold(columns, x.shape[2:], weight.shape[2:], dilation, padding, stride)
    if needed[1]:
        dweight = _product(g, _columns(x, weight, stride, padding, dilation).T).reshape(weight.shape)
    return dx, dweight, _sum(grad, (0, 2, 3)) if needed[2] else None


_SUMS: dict[Any, Callable[..., Any]] = {
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.mv.default: lambda a, x: _product(a, x[:, None])[:, 0],
    aten.dot.default: lambda x, y: _product(x[None], y[:, None])[0, 0],
    aten.addmm.default: _sum_and_product,
    aten.baddbmm.default: _sum_and_product,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}
