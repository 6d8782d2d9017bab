"""ResNet-18, one per expert."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import _checks as check
from moe_kernels.nn.cond_conv import ExpertCondConv2d
from moe_kernels.nn.grouped import GroupedNetwork, stage
from moe_kernels.nn.layers import ExpertBatchNorm2d, ExpertConv2d, ExpertLinear
from moe_kernels.nn.recompute import RECOMPUTE, recomputed
from moe_kernels.ops import mask_relu


class ExpertBasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)); the shortcut is a 1x1 convolution where shapes change."""

    def __init__(
        self,
        num_experts: int,
        in_channels: int,
        channels: int,
        stride: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        num_kernels: int = 1,
    ) -> None:
        super().__init__()
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = _convolution(num_experts, num_kernels, in_channels, channels, stride, **to)
        self.bn1 = ExpertBatchNorm2d(num_experts, channels, **to)
        self.conv2 = _convolution(num_experts, num_kernels, channels, channels, 1, **to)
        self.bn2 = ExpertBatchNorm2d(num_experts, channels, **to)
        self.shortcut = nn.ModuleList()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(ExpertConv2d(num_experts, in_channels, channels, 1, stride, bias=False, **to))
            self.shortcut.append(ExpertBatchNorm2d(num_experts, channels, **to))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, C, H, W] sorted by expert -> [N, channels, H', W']."""
        h = recomputed(self._inner, self.conv1(x, offsets), offsets)
        h = self.conv2(h, offsets)
        if self.shortcut:
            convolution, norm = self.shortcut
            x = recomputed(norm, convolution(x, offsets), offsets)
        return recomputed(self._outer, h, x, offsets)

    def _inner(self, h: Tensor, offsets: Tensor) -> Tensor:
        return mask_relu(self.bn1(h, offsets))

    def _outer(self, h: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
        return mask_relu(self.bn2(h, offsets) + x)


def _convolution(
    num_experts: int, num_kernels: int, before: int, channels: int, stride: int, **to: Any
) -> ExpertConv2d | ExpertCondConv2d:
    if num_kernels == 1:
        return ExpertConv2d(num_experts, before, channels, 3, stride, 1, bias=False, **to)
    return ExpertCondConv2d(num_experts, num_kernels, before, channels, 3, stride, 1, **to)


STAGES = 4  # of two basic blocks each; stage i has width * 2^(i - 1) channels, and all but the first halve the image


def _features(in_channels: int, width: int, stages: int) -> int:
    """Channels of the images, or of the result of the stem and that many stages."""
    return in_channels if stages == 0 else width * 2 ** (stages - 1)


def check_stages(shared_stages: int, least: int) -> None:
    if not isinstance(shared_stages, int) or not least <= shared_stages <= STAGES:
        raise ValueError(f"shared_stages must be a whole number from {least} to {STAGES}, got {shared_stages!r}")


class ResNet18Stages(GroupedNetwork):
    """The stem and some stages of a ResNet-18 per expert; `ExpertResNet18` explains the arguments."""

    def __init__(
        self,
        num_experts: int,
        in_channels: int,
        width: int,
        first: int,
        last: int,
        recompute: str,
        num_kernels: int,
        **to: Any,
    ) -> None:
        super().__init__()
        check.one_of("recompute", recompute, RECOMPUTE)
        sizes = {"num_experts": num_experts, "in_channels": in_channels, "width": width, "num_kernels": num_kernels}
        for name, size in sizes.items():
            check.count(name, size, 1)
        self.num_experts, self.recompute = num_experts, recompute
        if first == 1:
            self.conv1 = ExpertConv2d(num_experts, in_channels, width, 3, 1, 1, bias=False, **to)
            self.bn1 = ExpertBatchNorm2d(num_experts, width, **to)
        for i in range(first, last + 1):
            before, stride = (width, 1) if i == 1 else (_features(in_channels, width, i - 1), 2)
            channels, kinds = width * 2 ** (i - 1), {"num_kernels": num_kernels, **to}
            blocks = stage(ExpertBasicBlock, 2, num_experts, before, channels, stride, **kinds)
            self.add_module(f"layer{i}", blocks)

    def features(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, C, H, W] -> the last stage's result."""
        h = x.contiguous(memory_format=torch.channels_last)  # fastest for convolutions
        if hasattr(self, "conv1"):
            h = recomputed(self._stem, recomputed(self.conv1, h, offsets), offsets)
        for block in chain.from_iterable(getattr(self, f"layer{i}", ()) for i in range(1, STAGES + 1)):
            h = block(h, offsets)
        return h

    def _stem(self, h: Tensor, offsets: Tensor) -> Tensor:
        return mask_relu(self.bn1(h, offsets))

    @staticmethod
    def plain_name(key: str) -> str:
        return re.sub(r"^fc\.", "linear.", key.replace(".downsample.", ".shortcut."))


class ExpertResNet18(ResNet18Stages):
    """A CIFAR ResNet-18 per expert: 3x3 stem without pooling, four stages of two basic blocks, average pool, linear.

    Args:
        num_experts: number of experts E.
        num_classes: number of logits.
        in_channels: channels of the images.
        width: channels of the first stage; the others have 2, 4 and 8 times as many.
        device, dtype: those of the parameters.
        recompute: what the backward recomputes instead of saving it: "none"; "activations", which saves the results of
            all convolutions but the first, and one bit per element of each ReLU; "all", which saves only the images and
            recomputes one expert after the other, so that only one has activations at a time.
        shared_stages: number of stages, 0 to 4, that a `ResNet18Trunk` computes first; x is then its result, and the
            experts have neither these stages nor, unless it is 0, the stem.
        num_kernels: if more than 1, every 3x3 convolution in the stages is an `ExpertCondConv2d` of so many kernels.

    Raises:
        ValueError: if a size is less than 1, or recompute or shared_stages is out of range.
    """

    def __init__(
        self,
        num_experts: int,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: str = "activations",
        shared_stages: int = 0,
        num_kernels: int = 1,
    ) -> None:
        check_stages(shared_stages, 0)
        check.count("num_classes", num_classes, 1)
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(num_experts, in_channels, width, shared_stages + 1, STAGES, recompute, num_kernels, **to)
        self.linear = ExpertLinear(num_experts, 8 * width, num_classes, **to)

    def logits(self, x: Tensor, offsets: Tensor) -> Tensor:
        return self.linear(self.features(x, offsets).mean((2, 3)), offsets)

    @classmethod
    def from_state_dicts(cls, experts: Sequence[Mapping[str, Tensor]]) -> "ExpertResNet18":
        """The grouped network of plain ResNet-18 state dicts, one per expert, named as in pytorch-cifar or torchvision.

        Raises:
            ValueError: if there are none, or keys are missing, unexpected or of another shape.
        """
        if not experts:
            raise ValueError("experts must be a list of at least one state dict, got none")
        first = {cls.plain_name(key): value for key, value in experts[0].items()}
        for key in ("conv1.weight", "linear.weight"):
            if key not in first:
                raise ValueError(f"experts[0] must be a ResNet-18 state dict, missing {key}")
        stem, linear = first["conv1.weight"], first["linear.weight"]
        width, in_channels = stem.shape[:2]
        net = cls(len(experts), linear.shape[0], in_channels, width, stem.device, stem.dtype)
        net.load_state_dicts(experts)
        return net
