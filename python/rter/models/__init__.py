"""Models: a mixture of experts behind a router, for images in [0, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from moe_kernels import RobustMoE
from rter.data import Data
from rter.models.classifier import DualClassifier, Normalize, RobustClassifier, View
from rter.models.networks import ExpertConvNet

if TYPE_CHECKING:
    from rter.config import Config  # which imports the methods

__all__ = ["DualClassifier", "Normalize", "RobustClassifier", "View", "build_model"]

STATISTICS = 10_000  # training images that the normaliser is made of


def build_model(config: Config, data: Data) -> RobustClassifier:
    """The model before training; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed_for("init"))
        robust = _classifier(config, data)
        return DualClassifier(_classifier(config, data), robust, config.dual_alpha) if config.dual else robust


def _classifier(config: Config, data: Data) -> RobustClassifier:
    C, H, W = data.train.pixels.shape[1:]
    experts = ExpertConvNet(config.num_experts, (C, H, W), data.num_classes, config.width)
    linear = nn.Linear(C * H * W, config.num_experts)
    nn.init.zeros_(linear.bias)
    top_k = config.num_experts if config.gate == "soft" else 1
    moe = RobustMoE.from_experts(experts, nn.Sequential(nn.Flatten(), linear), top_k, config.gate)
    return RobustClassifier(Normalize(data.train[:STATISTICS].x), moe)
