"""The networks that choose an expert for each image; all begin without a preference of their own: a bias of zero."""

import torch
from torch import nn

from rter.config import Config

HIDDEN = 64


def _linear(image: torch.Size, num_experts: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(image.numel(), num_experts))


def _conv(image: torch.Size, num_experts: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(image[0], HIDDEN // 4, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(HIDDEN // 4, HIDDEN, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(HIDDEN, num_experts),
    )


def _mlp(image: torch.Size, num_experts: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(image.numel(), HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, num_experts))


ROUTERS = {"linear": _linear, "conv": _conv, "mlp": _mlp}


def make_router(config: Config, image: torch.Size) -> nn.Sequential:
    """Logits [B, E] of images [B, C, H, W]."""
    router = ROUTERS[config.router](image, config.num_experts)
    last = router[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.bias)
    return router
