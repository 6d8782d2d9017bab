"""Convolutions whose kernel is a mixture for each image, the softest kind of expert."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import _checks as check
from moe_kernels.nn.layers import ExpertBatchNorm2d, ExpertConv2d, ExpertLinear, reset_like_torch
from moe_kernels.ops import expert_linear

MERGED = 96  # least products per weight of an image for which merging its kernels pays (docs/facts.md)


class ExpertCondConv2d(ExpertConv2d):
    """A 2D convolution per expert whose kernel is, for each image, a weighted sum of K: `weight` [E, K, O, C, kh, kw].

    The weights of the sum are sigmoids of a linear map of the means of x's channels, standardised over the batch.

    Args:
        num_experts: number of experts E.
        kernels: number of kernels K of each expert.
        in_channels: channels of x, C.
        out_channels: channels of the result, O.
        kernel_size, stride, padding: in pixels, one number or (vertical, horizontal).
        device, dtype: those of the parameters.

    Raises:
        ValueError: if a number is less than 1, or the padding negative.

    Source: Yang et al., "CondConv: Conditionally Parameterized Convolutions for Efficient Inference", NeurIPS 2019;
    there the means are not standardised.
    """

    def __init__(
        self,
        num_experts: int,
        kernels: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        check.count("kernels", kernels, 1)
        super().__init__(num_experts * kernels, in_channels, out_channels, kernel_size, stride, padding, False, **to)
        self.num_experts = num_experts
        self.weight = nn.Parameter(self.weight.detach().unflatten(0, (num_experts, kernels)))
        self.norm = ExpertBatchNorm2d(num_experts, in_channels, affine=False, **to)
        self.router = ExpertLinear(num_experts, in_channels, kernels, **to)

    def reset_parameters(self) -> None:
        weight = self.weight.detach()
        reset_like_torch(weight.flatten(0, -5), None)

    def gates(self, x: Tensor, offsets: Tensor) -> Tensor:
        """The weights of each image's kernels [N, K]."""
        return self.router(self.norm(x.mean((2, 3), keepdim=True), offsets).flatten(1), offsets).sigmoid()

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, C, H, W] sorted by expert -> [N, O, H', W']."""
        gates, (kernels, O, C, *size) = self.gates(x, offsets), self.weight.shape[1:]
        height, width = (s // t for s, t in zip(x.shape[2:], check.pair("stride", self.stride, 1), strict=True))
        if height * width * (kernels - 1) >= MERGED:
            merged = expert_linear(gates, self.weight.flatten(2).mT, None, offsets).view(-1, O, C, *size)
            each = torch.arange(len(x) + 1, dtype=torch.int32, device=x.device)
            return self.convolved(x, merged, each)
        scaled = torch.cat([x * g[:, None, None, None] for g in gates.unbind(1)], 1)
        return self.convolved(scaled, self.weight.transpose(1, 2).flatten(2, 3), offsets)
