"""An operation that keeps for its input gradient what its caller chooses, in place of what torch would keep."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_kernels._torch import is_view

Size = int | Sequence[int]
Rule = Callable[..., Tensor]


class _Lean(torch.autograd.Function):
    """y, kept = forward(x), with the input gradient backward(grad, *kept); if `inplace`, y is x, overwritten."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable[..., Any], backward: Callable[..., Tensor], inplace: bool
    ) -> Tensor:
        y, kept = forward(x, inplace=True) if inplace else forward(x)
        ctx.save_for_backward(*kept)
        ctx.input_gradient, ctx.dtype = backward, x.dtype
        if inplace:
            ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.input_gradient(grad, *ctx.saved_tensors).to(ctx.dtype), None, None, None


def lean(x: Tensor, forward: Callable[..., Any], backward: Callable[..., Tensor], inplace: bool = False) -> Tensor:
    """y of y, kept = forward(x), with the input gradient backward(grad, *kept).

    `inplace` overwrites x with y, by forward(x, inplace=True); for a leaf, which torch would refuse, the result is
    NotImplemented.
    """
    if inplace and (x.is_leaf or is_view(x)):
        return NotImplemented if x.is_leaf else x.copy_(_Lean.apply(x, forward, backward, False))
    return _Lean.apply(x, forward, backward, inplace)


def blank_like(x: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that makes an uninitialised tensor like x, for a backward that needs x's layout but not its values."""
    shape, stride = x.shape, x.stride()
    return lambda grad: torch.empty_strided(shape, stride, dtype=grad.dtype, device=grad.device)


def each(size: Any, n: int) -> list[Any]:
    """n sizes, given as one number for all or as n numbers."""
    sizes = list(size) if isinstance(size, tuple | list) else [int(size)]
    return sizes * n if len(sizes) == 1 else sizes
