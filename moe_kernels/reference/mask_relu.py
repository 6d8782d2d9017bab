"""y = max(x, 0), and a mask of where the gradient passes: element i, in storage order, is bit i % 8 of byte i // 8."""

import torch
from torch import Tensor
from torch.nn import functional as F


def mask_relu(x: Tensor) -> Tensor:
    return torch.relu(x)


def mask_relu_forward(
    x: Tensor, low: float = 0, high: float | None = None, slope: float | None = None
) -> tuple[Tensor, Tensor]:
    """y = x where low < x < high, and beyond the nearer bound, with low <= high; or, if there is a slope, y = x where
    low < x, and slope * x beyond."""
    channels_last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    passes = x > low if slope is not None else ~(x <= low) if high is None else ~((x <= low) | (x >= high))
    flat = (passes.movedim(1, -1) if channels_last else passes).flatten()
    padded = F.pad(flat.int(), (0, -flat.numel() % 8)).view(-1, 8)
    powers = 2 ** torch.arange(8, dtype=torch.int32, device=x.device)
    y = torch.where(passes, x, x * slope if slope is not None else x.clamp(low, high))
    return y, (padded * powers).sum(1).to(torch.uint8)


def mask_relu_forward_(x: Tensor, low: float = 0, high: float | None = None, slope: float | None = None) -> Tensor:
    y, bits = mask_relu_forward(x, low, high, slope)
    x.copy_(y)
    return bits


def mask_relu_backward(grad: Tensor, bits: Tensor, channels_last: bool, slope: float | None = None) -> Tensor:
    shape = grad.movedim(1, -1).shape if channels_last else grad.shape
    passes = (bits[:, None] >> torch.arange(8, device=bits.device) & 1).flatten()[: grad.numel()].view(shape)
    beyond = 0 if slope is None else grad * slope
    return torch.where((passes.movedim(-1, 1) if channels_last else passes) == 1, grad, beyond)
