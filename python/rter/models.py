"""A mixture of small convolutional experts behind a linear router, and the views of it that attacks look through."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe_kernels import ExpertConv2d, ExpertLinear, RobustMoE, Routing
from moe_kernels.ops import mask_relu
from rter.data import Data

if TYPE_CHECKING:
    from rter.config import Config  # which imports the methods


class Normalize(nn.Module):
    """(x - mean) / std with the training images' mean and std of each channel."""

    mean: Tensor  # [C, 1, 1]
    std: Tensor  # [C, 1, 1]

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        std, mean = torch.std_mean(images, dim=(0, 2, 3))
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", std[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class ExpertConvNet(nn.Module):
    """All experts as one grouped network: two convolutions, the second of stride 2, and two linear layers."""

    def __init__(self, num_experts: int, image: tuple[int, int, int], num_classes: int, width: int) -> None:
        super().__init__()
        C, H, W = image
        features = 2 * width * ((H + 1) // 2) * ((W + 1) // 2)
        self.num_experts = num_experts
        self.conv1 = ExpertConv2d(num_experts, C, width, 3, padding=1)
        self.conv2 = ExpertConv2d(num_experts, width, 2 * width, 3, stride=2, padding=1)
        self.hidden = ExpertLinear(num_experts, features, 4 * width)
        self.head = ExpertLinear(num_experts, 4 * width, num_classes)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        x = mask_relu(self.conv1(x, offsets))
        x = mask_relu(self.conv2(x, offsets))
        x = mask_relu(self.hidden(x.flatten(1), offsets))
        return self.head(x, offsets)


class RobustClassifier(nn.Module):
    """Logits of images in [0, 1]: the normaliser, then a top-1 mixture of experts."""

    def __init__(self, normalize: Normalize, moe: RobustMoE) -> None:
        super().__init__()
        self.normalize = normalize
        self.moe = moe

    @property
    def num_experts(self) -> int:
        return self.moe.num_experts

    def route(self, x: Tensor, top_k: int | None = None) -> Routing:
        return self.moe.route(self.normalize(x), top_k)

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        return self.moe(self.normalize(x), routing=routing)


class View(nn.Module):
    """A function of the model's output or route, as a module that an attack can take."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.model, x)


def build_model(config: Config, data: Data) -> RobustClassifier:
    """The model before training; the global random state is left as it was."""
    C, H, W = data.train.x.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed_for("init"))
        experts = ExpertConvNet(config.num_experts, (C, H, W), data.num_classes, config.width)
        linear = nn.Linear(C * H * W, config.num_experts)
        nn.init.zeros_(linear.bias)
    moe = RobustMoE.from_experts(experts, nn.Sequential(nn.Flatten(), linear), gate=config.gate)
    return RobustClassifier(Normalize(data.train.x), moe)
