"""Models: a mixture of experts behind a router, for images in [0, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from moe_kernels import RobustMoE
from rter.data import Data
from rter.models.classifier import Normalize, RobustClassifier, View
from rter.models.networks import ExpertConvNet

if TYPE_CHECKING:
    from rter.config import Config  # which imports the methods

__all__ = ["Normalize", "RobustClassifier", "View", "build_model"]

STATISTICS = 10_000  # training images that the normaliser is made of


def build_model(config: Config, data: Data) -> RobustClassifier:
    """The model before training; the global random state is left as it was."""
    C, H, W = data.train.pixels.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed_for("init"))
        experts = ExpertConvNet(config.num_experts, (C, H, W), data.num_classes, config.width)
        linear = nn.Linear(C * H * W, config.num_experts)
        nn.init.zeros_(linear.bias)
    moe = RobustMoE.from_experts(experts, nn.Sequential(nn.Flatten(), linear), gate=config.gate)
    return RobustClassifier(Normalize(data.train[:STATISTICS].x), moe)
