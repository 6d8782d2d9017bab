"""A convolution whose kernel is mixed anew for every image."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import _checks as check
from moe_kernels._layout import memory_format
from moe_kernels.nn.layers import ExpertBatchNorm2d, ExpertLinear, Pixels, convolve, reset_like_torch
from moe_kernels.nn.recompute import recomputed
from moe_kernels.ops import expert_linear
from moe_kernels.ops.expert_conv2d import check_kernel

# An image's kernels are mixed before the convolution if K times its pixels is at least MIX_FIRST, or images are at most
# FEW, and else after it, by a convolution of K scaled copies of the image: the faster on a CPU (docs/facts.md).
MIX_FIRST = 256
FEW = 2


class ExpertCondConv2d(nn.Module):
    """A 2D convolution per expert with K kernels, of which every image gets a sum of its own: `weight`
    [E, K, O, C, kh, kw].

    The K coefficients of an image are sigmoids of a linear map of the means of its channels, which are standardised
    over the expert's batch, or by running statistics in eval mode. The map starts at zero, so that at first all images
    have one kernel. There is no bias.

    Args:
        num_experts: number of experts E.
        num_kernels: number of kernels of each, K.
        in_channels: channels of x, C.
        out_channels: channels of the result, O.
        kernel_size, stride, padding: in pixels, one number or (vertical, horizontal).
        device, dtype: those of the parameters.

    Raises:
        ValueError: if a number is less than 1, or the padding negative.

    Source: Yang et al., "CondConv: Conditionally Parameterized Convolutions for Efficient Inference", NeurIPS 2019,
    where the means are not standardised, and the map starts at random.
    """

    def __init__(
        self,
        num_experts: int,
        num_kernels: int,
        in_channels: int,
        out_channels: int,
        kernel_size: Pixels,
        stride: Pixels = 1,
        padding: Pixels = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = {"num_kernels": num_kernels, "in_channels": in_channels, "out_channels": out_channels}
        for name, size in sizes.items():
            check.count(name, size, 1)
        check.pair("stride", stride, 1)
        check.pair("padding", padding, 0)
        kernel = check.pair("kernel_size", kernel_size, 1)
        self.num_experts, self.stride, self.padding = num_experts, stride, padding
        self.norm = ExpertBatchNorm2d(num_experts, in_channels, affine=False, **to)
        self.router = ExpertLinear(num_experts, in_channels, num_kernels, **to)
        self.router.init_std = 0.0
        self.router.reset_parameters()
        self.weight = nn.Parameter(torch.empty(num_experts, num_kernels, out_channels, in_channels, *kernel, **to))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.weight.unbind(1):
            reset_like_torch(weight, None)

    def coefficients(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, C, H, W] sorted by expert -> [N, K], each in (0, 1)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        means = x.sum((2, 3), keepdim=True, dtype=wide) / x.shape[2:].numel()  # mean()'s backward fills a whole image
        return self.router(self.norm(means.to(x.dtype), offsets).flatten(1), offsets).sigmoid()

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, C, H, W] sorted by expert, offsets int32 [E + 1] -> [N, O, H', W']."""
        check.shape("x", x, (None, self.weight.shape[3], None, None), "[N, C, H, W] with C = in_channels")
        check.offsets(offsets, len(self.weight), x)
        check_kernel(x, self.weight, check.pair("padding", self.padding, 0))
        mix = self.coefficients(x, offsets)
        pixels = x.shape[2:].numel() // torch.Size(check.pair("stride", self.stride, 1)).numel()
        if len(x) > 0 and (len(x) <= FEW or pixels * mix.shape[1] >= MIX_FIRST):
            each = torch.arange(len(x) + 1, dtype=torch.int32, device=x.device)
            return convolve(x, recomputed(self._mixed, mix, offsets), None, each, self.stride, self.padding)
        copies, kernels = recomputed(_scaled_copies, x, mix), recomputed(self._joined)
        return convolve(copies, kernels, None, offsets, self.stride, self.padding)

    def _mixed(self, mix: Tensor, offsets: Tensor) -> Tensor:
        """A kernel for every image [N, O, C, kh, kw]."""
        return expert_linear(mix, self.weight.flatten(2).mT, None, offsets).unflatten(1, self.weight.shape[2:])

    def _joined(self) -> Tensor:
        """The kernels of every expert as one [E, O, K C, kh, kw]."""
        return self.weight.transpose(1, 2).flatten(2, 3)

    def extra_repr(self) -> str:
        return f"weight={list(self.weight.shape)}, stride={self.stride}, padding={self.padding}"


def _scaled_copies(x: Tensor, mix: Tensor) -> Tensor:
    """[N, K C, H, W] in the layout of x."""
    copies = x.permute(0, 2, 3, 1).unsqueeze(3) * mix.to(x.dtype)[:, None, None, :, None]
    return copies.flatten(3).permute(0, 3, 1, 2).contiguous(memory_format=memory_format(x))
