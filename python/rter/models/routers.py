"""The networks that choose an expert for each image; their last bias starts at zero, so that none is preferred."""

import pkgutil

import torch
from torch import nn

from rter.config import Config
from rter.models import ROUTERS

HIDDEN = 64


def linear(image: torch.Size, num_experts: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(image.numel(), num_experts))


def conv(image: torch.Size, num_experts: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(image[0], HIDDEN // 4, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(HIDDEN // 4, HIDDEN, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(HIDDEN, num_experts),
    )


def mlp(image: torch.Size, num_experts: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(image.numel(), HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, num_experts))


def pooled(image: torch.Size, num_experts: int) -> nn.Sequential:
    """By the means of the standardised channels. Features of shared stages are far from zero on average: reading them
    as they are, a router soon sends all images to one expert and, its softmax being exactly 1, cannot turn back."""
    return nn.Sequential(
        nn.BatchNorm2d(image[0], affine=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(image[0], num_experts),
    )


def make_router(config: Config, image: torch.Size) -> nn.Sequential:
    """Logits [B, E] of images [B, C, H, W]."""
    router: nn.Sequential = pkgutil.resolve_name(ROUTERS[config.router])(image, config.num_experts)
    last = router[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.bias)
    return router
