"""The networks that serve as experts, each as one grouped network."""

import pkgutil
from typing import TypeVar

import torch
from torch import Tensor

from moe_kernels import ExpertConv2d, ExpertLinear, ExpertPreActResNet, ExpertResNet18, ExpertViT, ResNet18Trunk
from moe_kernels.nn import GroupedNetwork
from moe_kernels.ops import mask_relu
from rter.config import Config
from rter.errors import UserError
from rter.models import NETWORKS

N = TypeVar("N", bound=GroupedNetwork)


class ExpertConvNet(GroupedNetwork):
    """All experts as one grouped network: two convolutions, the second of stride 2, and two linear layers."""

    def __init__(self, num_experts: int, image: torch.Size, num_classes: int, width: int) -> None:
        super().__init__()
        C, H, W = image
        features = 2 * width * ((H + 1) // 2) * ((W + 1) // 2)
        self.num_experts = num_experts
        self.conv1 = ExpertConv2d(num_experts, C, width, 3, padding=1)
        self.conv2 = ExpertConv2d(num_experts, width, 2 * width, 3, stride=2, padding=1)
        self.hidden = ExpertLinear(num_experts, features, 4 * width)
        self.head = ExpertLinear(num_experts, 4 * width, num_classes)

    def logits(self, x: Tensor, offsets: Tensor) -> Tensor:
        x = mask_relu(self.conv1(x, offsets))
        x = mask_relu(self.conv2(x, offsets))
        x = mask_relu(self.hidden(x.flatten(1), offsets))
        return self.head(x, offsets)


def small_conv(config: Config, image: torch.Size, num_classes: int) -> GroupedNetwork:
    return ExpertConvNet(config.num_experts, image, num_classes, config.width)


def resnet18(config: Config, image: torch.Size, num_classes: int) -> GroupedNetwork:
    shared, kernels = config.shared_stages, config.kernels
    return ExpertResNet18(
        config.num_experts, num_classes, image[0], config.width, shared_stages=shared, num_kernels=kernels
    )


def preact_resnet18(config: Config, image: torch.Size, num_classes: int) -> GroupedNetwork:
    return ExpertPreActResNet.resnet18(config.num_experts, num_classes, image[0], config.width)


def wrn(config: Config, image: torch.Size, num_classes: int) -> GroupedNetwork:
    return ExpertPreActResNet.wide(config.num_experts, num_classes, image[0], config.depth, config.width)


def vit(config: Config, image: torch.Size, num_classes: int) -> GroupedNetwork:
    C, H, W = image
    if H != W:
        raise ValueError(f"images must be square, got {H} x {W}")
    heads = max(config.width // 64, 1)
    return ExpertViT(config.num_experts, num_classes, C, H, config.patch, config.width, config.depth, heads)


def make_experts(config: Config, image: torch.Size, num_classes: int) -> GroupedNetwork:
    """The experts of the run as one grouped network.

    Raises:
        UserError: if the settings do not fit the network or the images.
    """
    try:
        experts: GroupedNetwork = pkgutil.resolve_name(NETWORKS[config.model].build)(config, image, num_classes)
    except ValueError as error:
        raise UserError(f"model {config.model}: {error}") from None
    return _recomputing(experts, config)


def make_trunk(config: Config, image: torch.Size) -> tuple[ResNet18Trunk | None, torch.Size]:
    """The layers that the experts share, if any, and the shape [C, H, W] of the input of experts and router."""
    if not config.shared_stages:
        return None, image
    trunk = ResNet18Trunk(config.shared_stages, image[0], config.width, num_kernels=config.kernels)
    C, H, W = config.width, *image[1:]
    for _ in range(config.shared_stages - 1):
        C, H, W = 2 * C, (H + 1) // 2, (W + 1) // 2
    return _recomputing(trunk, config), torch.Size((C, H, W))


def _recomputing(network: N, config: Config) -> N:
    if config.recompute != "auto":
        network.recompute = config.recompute
    return network
