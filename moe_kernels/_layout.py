"""Memory layouts of images and of the weights of convolutions."""

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of an image operator's result for x: channels-last if x is, else contiguous."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def channels_innermost(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x [N, ..., C, H, W] with C innermost in memory, in its own or another dtype. All operands of GPU convolutions
    have this layout, since the kernels load 16 bytes at a time and index the elements of an item in 32 bits. x is
    copied if it has another layout or an item spans more memory than that."""
    dtype = dtype or x.dtype
    span = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    if (x.stride(-3) == 1 or x.shape[-3] == 1) and span < 2**31:
        return x.to(dtype)
    return x.movedim(-3, -1).to(dtype, copy=True, memory_format=torch.contiguous_format).movedim(-1, -3)
