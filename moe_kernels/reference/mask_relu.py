"""y = max(x, 0), and a mask of where the gradient passes: element i, in storage order, is bit i % 8 of byte i // 8."""

import torch
from torch import Tensor
from torch.nn import functional as F


def mask_relu(x: Tensor) -> Tensor:
    return torch.relu(x)


def mask_relu_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    channels_last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    passes = ~(x.movedim(1, -1) if channels_last else x).le(0).flatten()
    padded = F.pad(passes.int(), (0, -passes.numel() % 8)).view(-1, 8)
    powers = 2 ** torch.arange(8, dtype=torch.int32, device=x.device)
    return torch.relu(x), (padded * powers).sum(1).to(torch.uint8)


def mask_relu_backward(grad: Tensor, bits: Tensor, channels_last: bool) -> Tensor:
    shape = grad.movedim(1, -1).shape if channels_last else grad.shape
    passes = (bits[:, None] >> torch.arange(8, device=bits.device) & 1).flatten()[: grad.numel()].view(shape)
    return torch.where((passes.movedim(-1, 1) if channels_last else passes) == 1, grad, 0)
