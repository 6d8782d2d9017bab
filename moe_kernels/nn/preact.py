"""Pre-activation residual networks, one per expert: PreAct ResNet-18 and wide ResNets."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import _checks as check
from moe_kernels.nn.grouped import GroupedNetwork, stage
from moe_kernels.nn.layers import ExpertBatchNorm2d, ExpertConv2d, ExpertLinear
from moe_kernels.nn.recompute import RECOMPUTE, recomputed
from moe_kernels.ops import mask_relu


class ExpertPreActBlock(nn.Module):
    """conv2(relu(bn2(conv1(h)))) + s with h = relu(bn1(x)); s is x, or a 1x1 convolution of h where shapes change."""

    def __init__(
        self,
        num_experts: int,
        in_channels: int,
        channels: int,
        stride: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        self.bn1 = ExpertBatchNorm2d(num_experts, in_channels, **to)
        self.conv1 = ExpertConv2d(num_experts, in_channels, channels, 3, stride, 1, bias=False, **to)
        self.bn2 = ExpertBatchNorm2d(num_experts, channels, **to)
        self.conv2 = ExpertConv2d(num_experts, channels, channels, 3, 1, 1, bias=False, **to)
        changes = stride != 1 or in_channels != channels
        self.shortcut = (
            ExpertConv2d(num_experts, in_channels, channels, 1, stride, bias=False, **to) if changes else None
        )

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        h = recomputed(self._before_first, x, offsets)
        s = x if self.shortcut is None else self.shortcut(h, offsets)
        h = recomputed(self._before_second, self.conv1(h, offsets), offsets)
        return self.conv2(h, offsets) + s

    def _before_first(self, x: Tensor, offsets: Tensor) -> Tensor:
        return mask_relu(self.bn1(x, offsets))

    def _before_second(self, h: Tensor, offsets: Tensor) -> Tensor:
        return mask_relu(self.bn2(h, offsets))


class ExpertPreActResNet(GroupedNetwork):
    """A pre-activation ResNet per expert: 3x3 stem, stages of blocks, batch norm, ReLU, average pool, linear.

    Args:
        num_experts: number of experts E.
        num_classes: number of logits.
        in_channels: channels of the images.
        stages: (channels, blocks) of each stage; all but the first halve the image.
        stem: channels of the stem.
        device, dtype: those of the parameters.
        recompute: what the backward recomputes instead of saving it: "none"; "activations", which saves the results of
            the convolutions, their sums with the shortcuts, and one bit per element of each ReLU; "all", which saves
            only the images and recomputes one expert after the other (`GroupedNetwork`).

    Raises:
        ValueError: if a size is less than 1, or recompute is unknown.
    """

    def __init__(
        self,
        num_experts: int,
        num_classes: int,
        in_channels: int,
        stages: Sequence[tuple[int, int]],
        stem: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        check.one_of("recompute", recompute, RECOMPUTE)
        check.count("num_classes", num_classes, 1)
        check.count("stem", stem, 1)
        for width, depth in stages:
            check.count("channels of stages", width, 1)
            check.count("blocks of stages", depth, 1)
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_experts, self.recompute = num_experts, recompute
        self.conv1 = ExpertConv2d(num_experts, in_channels, stem, 3, 1, 1, bias=False, **to)
        widths = [stem, *(width for width, _ in stages)]
        self.blocks = nn.ModuleList(
            chain.from_iterable(
                stage(ExpertPreActBlock, depth, num_experts, widths[i], width, 1 if i == 0 else 2, **to)
                for i, (width, depth) in enumerate(stages)
            )
        )
        self.bn = ExpertBatchNorm2d(num_experts, widths[-1], **to)
        self.linear = ExpertLinear(num_experts, widths[-1], num_classes, **to)

    @classmethod
    def resnet18(
        cls, num_experts: int, num_classes: int = 10, in_channels: int = 3, width: int = 64, **options: Any
    ) -> "ExpertPreActResNet":
        """PreAct ResNet-18 (He et al., 2016), whose first stage has `width` channels."""
        check.count("width", width, 1)
        stages = [(width, 2), (2 * width, 2), (4 * width, 2), (8 * width, 2)]
        return cls(num_experts, num_classes, in_channels, stages, width, **options)

    @classmethod
    def wide(
        cls,
        num_experts: int,
        num_classes: int = 10,
        in_channels: int = 3,
        depth: int = 28,
        width: int = 160,
        **options: Any,
    ) -> "ExpertPreActResNet":
        """Wide ResNet (Zagoruyko and Komodakis, 2016): WRN-28-10 has depth 28 and width 160.

        Raises:
            ValueError: if depth is not 6 n + 4.
        """
        check.count("width", width, 1)
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 10, 16, 22, 28 or another 6 n + 4, got {depth}")
        stages = [(width, blocks), (2 * width, blocks), (4 * width, blocks)]
        return cls(num_experts, num_classes, in_channels, stages, 16, **options)

    def logits(self, x: Tensor, offsets: Tensor) -> Tensor:
        h = self.conv1(x.contiguous(memory_format=torch.channels_last), offsets)  # fastest for convolutions
        for block in self.blocks:
            h = block(h, offsets)
        return self.linear(mask_relu(self.bn(h, offsets)).mean((2, 3)), offsets)
