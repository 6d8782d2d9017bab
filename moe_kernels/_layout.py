"""Memory layouts of images and of the weights of convolutions."""

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout in which image operators answer x: channels-last where x is so, else contiguous."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def channels_innermost(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x [N, ..., C, H, W], on request in another dtype, with C innermost in memory: the layout of all operands of the
    convolutions on a GPU, which load 16 bytes at a time and count an item's elements in 32 bits. Copied where x lies
    otherwise or an item's elements lie further apart."""
    dtype = dtype or x.dtype
    span = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    if (x.stride(-3) == 1 or x.shape[-3] == 1) and span < 2**31:
        return x.to(dtype)
    return x.movedim(-3, -1).to(dtype, copy=True, memory_format=torch.contiguous_format).movedim(-1, -3)
