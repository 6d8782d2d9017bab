"""A PGD-10 on a dense ResNet-18 and one RT-ER step of four ResNet-18 experts, beside the usual code."""

import torch
from torch import Tensor, nn

from moe_kernels import ExpertResNet18
from moe_kernels.testing import Source

EPS, ALPHA, STEPS = 8 / 255, 2 / 255, 10


def images(batch: int, size: int) -> tuple[Tensor, Tensor]:
    s = Source(torch.float32)
    return s.rand(batch, 3, size, size), s.randint(10, batch).long()


class Alone(nn.Module):
    """One expert of a grouped network as a network of its own."""

    def __init__(self, experts: ExpertResNet18) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, torch.tensor([0, x.shape[0]], dtype=torch.int32))
