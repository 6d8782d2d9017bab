"""An operation that keeps for its input gradient what its caller chooses, in place of what torch would keep."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels._torch import is_view

Size = int | Sequence[int]
Rule = Callable[..., Tensor]


class _Lean(torch.autograd.Function):
    """y, kept = forward(x), with the input gradient backward(grad, *kept); `written` overwrites x with y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable[..., Any], backward: Callable[..., Tensor], written: bool
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


def lean(x: Tensor, forward: Callable[..., Any], backward: Callable[..., Tensor], inplace: bool = False) -> Tensor:
    """y of y, kept = forward(x), with the input gradient backward(grad, *kept).

    `inplace` overwrites x with y; for a leaf, which torch would refuse, the result is NotImplemented.
    """
    if inplace and (x.is_leaf or is_view(x)):
        return NotImplemented if x.is_leaf else x.copy_(_Lean.apply(x, forward, backward, False))
    return _Lean.apply(x, forward, backward, inplace)


def piecewise(
    x: Tensor, function: Callable[[Tensor], Tensor], passes: Callable[[Tensor], Tensor], slope: float, inplace: bool
) -> Tensor:
    """function(x), whose derivative is 1 where passes(x) is True and `slope` elsewhere; keeps one bit per element."""

    def backward(grad: Tensor, bits: Tensor) -> Tensor:
        shifts = torch.arange(8, device=bits.device)
        mask = (bits[:, None] >> shifts & 1).bool().flatten()[: grad.numel()].view(grad.shape)
        return torch.where(mask, grad, grad * slope if slope else 0)

    return lean(x, lambda x: (function(x), (_packed(passes(x)),)), backward, inplace)


def _packed(mask: Tensor) -> Tensor:
    """bool, any shape -> uint8 [ceil(numel / 8)]."""
    bytes_ = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bytes_ << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def blank_like(x: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that makes an uninitialised tensor like x, for a backward that needs x's layout but not its values."""
    shape, stride = x.shape, x.stride()
    return lambda grad: torch.empty_strided(shape, stride, dtype=grad.dtype, device=grad.device)


def each(size: Any, n: int) -> list[Any]:
    """n sizes, given as one number for all or as n numbers."""
    sizes = list(size) if isinstance(size, tuple | list) else [int(size)]
    return sizes * n if len(sizes) == 1 else sizes
