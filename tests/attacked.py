"""The networks and images that the tests of PGD attack, and the start of its steps."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels.attacks import PGD

WIDE = (-10.0, 10.0)
NORMS = {"Linf": math.inf, "L2": 2, "L1": 1}


def sizes(delta: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), NORMS[norm], dim=1)


def network(seed: int = 0, classes: int = 4) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(72, classes)
        )


def images(batch: int = 16, classes: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.rand(batch, 3, 5, 5, dtype=dtype), torch.arange(batch) % classes


def start(x: Tensor, **options: Any) -> Tensor:
    y = torch.zeros(len(x), dtype=torch.int64)
    return PGD(lambda x: x, steps=0, best_iterate=False, **options)(x, y)


def input_gradient(function: Callable[[Tensor], Tensor], x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """function(x), and the gradient of x for weights as that of the result."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, weights.to(y.dtype))[0]
