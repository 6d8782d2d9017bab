"""Grouped convolutional networks: every parameter is its plain layer's with a leading expert dimension [E]."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import _checks as check
from moe_kernels.nn.experts import ExpertLinear, reset_like_torch
from moe_kernels.nn.grouped import GroupedNetwork
from moe_kernels.nn.recompute import RECOMPUTE, WithStatistics, recomputed
from moe_kernels.ops import expert_batch_norm, expert_conv2d, mask_relu, winograd_conv2d
from moe_kernels.ops.winograd_conv2d import saves_work


class ExpertConv2d(nn.Module):
    """A 2D convolution per expert: `weight` [E, O, C, kh, kw], `bias` [E, O] or None.

    Where Winograd's algorithm saves work, on a CPU and not in float64, it is `winograd_conv2d`, else `expert_conv2d`.

    Args:
        num_experts: number of experts E.
        in_channels: channels of x, C.
        out_channels: channels of the result, O.
        kernel_size, stride, padding: in pixels, one number or (vertical, horizontal).
        bias: whether there is a bias.
    """

    def __init__(
        self,
        num_experts: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        shape = (num_experts, out_channels, in_channels, *kernel)
        self.num_experts, self.stride, self.padding = num_experts, stride, padding
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_like_torch(self.weight, self.bias)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, C, H, W] sorted by expert -> [N, O, H', W']."""
        if saves_work(x, self.weight, self.stride, self.padding):
            return winograd_conv2d(x, self.weight, self.bias, offsets, self.padding)
        return expert_conv2d(x, self.weight, self.bias, offsets, self.stride, self.padding)

    def extra_repr(self) -> str:
        return (
            f"weight={list(self.weight.shape)}, stride={self.stride}, padding={self.padding}, "
            f"bias={self.bias is not None}"
        )


class ExpertBatchNorm2d(WithStatistics):
    """Batch normalisation per expert: parameters and running statistics [E, C], `num_batches_tracked` [E].

    An expert without rows in a batch keeps its statistics.

    Args:
        num_experts: number of experts E.
        num_features: channels C.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics.
        affine: whether there are a weight and a bias.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_experts: int,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if momentum is None:
            raise ValueError("momentum must be a number, got None")
        self.num_experts, self.eps, self.momentum = num_experts, eps, momentum
        shape = (num_experts, num_features)
        self.weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)) if affine else None
        self.register_buffer("running_mean", torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(shape, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros(num_experts, dtype=torch.long, device=device))

    def reset_running_stats(self) -> None:
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, C, H, W] sorted by expert -> the same shape."""
        mean, var = self.running_mean, self.running_var
        if self.training and self.updates:
            self.num_batches_tracked.add_(offsets.diff() > 0)
        return expert_batch_norm(
            x,
            self.weight,
            self.bias,
            None if self.training and not self.updates else mean,
            None if self.training and not self.updates else var,
            offsets,
            self.training,
            self.momentum,
            self.eps,
        )

    def extra_repr(self) -> str:
        return f"{list(self.running_mean.shape)}, eps={self.eps}, momentum={self.momentum}"


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
    ) -> None:
        super().__init__()
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = ExpertConv2d(num_experts, in_channels, channels, 3, stride, 1, bias=False, **to)
        self.bn1 = ExpertBatchNorm2d(num_experts, channels, **to)
        self.conv2 = ExpertConv2d(num_experts, channels, channels, 3, 1, 1, bias=False, **to)
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


def stage(
    block: Callable[..., nn.Module], depth: int, num_experts: int, before: int, channels: int, stride: int, **to: Any
) -> nn.ModuleList:
    """`depth` blocks in a row, the first of which changes the channels and has the stride."""
    first = block(num_experts, before, channels, stride, **to)
    return nn.ModuleList([first, *(block(num_experts, channels, channels, 1, **to) for _ in range(depth - 1))])


STAGES = 4  # of two basic blocks each; stage i has width * 2^(i - 1) channels, and all but the first halve the image


def _features(in_channels: int, width: int, stages: int) -> int:
    """Channels of the images, or of what comes out of the stem and so many stages."""
    return in_channels if stages == 0 else width * 2 ** (stages - 1)


def check_stages(shared_stages: int, least: int) -> None:
    if shared_stages not in range(least, STAGES + 1):
        raise ValueError(f"shared_stages must be a whole number from {least} to {STAGES}, got {shared_stages!r}")


class ResNet18Stages(GroupedNetwork):
    """The stem and some stages of a ResNet-18 per expert; `ExpertResNet18` says what the arguments mean."""

    def __init__(
        self, num_experts: int, in_channels: int, width: int, first: int, last: int, recompute: str, **to: Any
    ) -> None:
        super().__init__()
        check.one_of("recompute", recompute, RECOMPUTE)
        self.num_experts, self.recompute = num_experts, recompute
        if first == 1:
            self.conv1 = ExpertConv2d(num_experts, in_channels, width, 3, 1, 1, bias=False, **to)
            self.bn1 = ExpertBatchNorm2d(num_experts, width, **to)
        self.stages = [f"layer{i}" for i in range(first, last + 1)]
        for i, name in enumerate(self.stages, first):
            before, stride = (width, 1) if i == 1 else (_features(in_channels, width, i - 1), 2)
            self.add_module(name, stage(ExpertBasicBlock, 2, num_experts, before, width * 2 ** (i - 1), stride, **to))

    def features(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, C, H, W] -> the last stage's result."""
        h = x.contiguous(memory_format=torch.channels_last)  # in which convolutions are fastest
        if hasattr(self, "conv1"):
            h = recomputed(self._stem, recomputed(self.conv1, h, offsets), offsets)
        for block in chain.from_iterable(getattr(self, name) for name in self.stages):
            h = block(h, offsets)
        return h

    def _stem(self, h: Tensor, offsets: Tensor) -> Tensor:
        return mask_relu(self.bn1(h, offsets))


class ExpertResNet18(ResNet18Stages):
    """A CIFAR ResNet-18 per expert: 3x3 stem without pooling, four stages of two basic blocks, average pool, linear.

    Args:
        num_experts: number of experts E.
        num_classes: number of logits.
        in_channels: channels of the images.
        width: channels of the first stage; the others have 2, 4 and 8 times as many.
        recompute: what the backward computes again instead of keeping it: "none"; "activations", which keeps the
            results of the convolutions but the first's, and one bit for each ReLU; "all", which keeps the images, and
            computes and differentiates one expert after the other, so that only one has activations at a time.
        shared_stages: how many stages, 0 to 4, a `ResNet18Trunk` computes before, whose result x then is. An expert has
            neither them nor, if there are any, the stem.

    Raises:
        ValueError: if recompute or shared_stages is out of range.
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
    ) -> None:
        check_stages(shared_stages, 0)
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(num_experts, in_channels, width, shared_stages + 1, STAGES, recompute, **to)
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

    @staticmethod
    def plain_name(key: str) -> str:
        return re.sub(r"^fc\.", "linear.", key.replace(".downsample.", ".shortcut."))
