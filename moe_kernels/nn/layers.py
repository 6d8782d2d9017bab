"""One layer per expert: every parameter is the plain layer's with a leading expert dimension [E]."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import _checks as check
from moe_kernels._torch import cast_for_autocast
from moe_kernels.nn.recompute import WithStatistics, recomputed
from moe_kernels.ops import expert_batch_norm, expert_conv2d, expert_linear, winograd_conv2d
from moe_kernels.ops.expert_sum import expand_to_rows
from moe_kernels.ops.winograd_conv2d import saves_work

Pixels = int | tuple[int, int]  # the same in both directions, or (vertical, horizontal)


class ExpertLinear(nn.Module):
    """A linear layer per expert: `weight` [E, out, in], `bias` [E, out] or None.

    Args:
        num_experts: number of experts E.
        in_features: width of x.
        out_features: width of the result.
        bias: whether there is a bias.
        device, dtype: those of the parameters.

    Raises:
        ValueError: if there is no expert, or a width is negative.

    Attributes:
        init_std: standard deviation of the weight that `reset_parameters` draws, with a bias of zero; None for the
            initial values of nn.Linear.
    """

    init_std: float | None = None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.count("num_experts", num_experts, 1)
        check.count("in_features", in_features, 0)
        check.count("out_features", out_features, 0)
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init_std is None:
            reset_like_torch(self.weight, self.bias)
            return
        if self.init_std == 0:
            nn.init.zeros_(self.weight)
        else:
            nn.init.trunc_normal_(self.weight, std=self.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, offsets: Tensor, rows: Tensor | None = None) -> Tensor:
        """x [N, in] sorted by expert -> [N, out]; with `rows` [N], slot j reads x[rows[j]]."""
        return expert_linear(x, self.weight, self.bias, offsets, rows)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )


class ExpertConv2d(nn.Module):
    """A 2D convolution per expert: `weight` [E, O, C, kh, kw], `bias` [E, O] or None.

    It runs `winograd_conv2d` where that is faster (on a CPU, not in float64), else `expert_conv2d`.

    Args:
        num_experts: number of experts E.
        in_channels: channels of x, C.
        out_channels: channels of the result, O.
        kernel_size, stride, padding: in pixels, one number or (vertical, horizontal).
        bias: whether there is a bias.
        device, dtype: those of the parameters.

    Raises:
        ValueError: if a number is less than 1, or the padding negative.
    """

    def __init__(
        self,
        num_experts: int,
        in_channels: int,
        out_channels: int,
        kernel_size: Pixels,
        stride: Pixels = 1,
        padding: Pixels = 0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_experts": num_experts, "in_channels": in_channels, "out_channels": out_channels}
        for name, size in sizes.items():
            check.count(name, size, 1)
        check.pair("stride", stride, 1)
        check.pair("padding", padding, 0)
        shape = (num_experts, out_channels, in_channels, *check.pair("kernel_size", kernel_size, 1))
        self.num_experts, self.stride, self.padding = num_experts, stride, padding
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_like_torch(self.weight, self.bias)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, C, H, W] sorted by expert -> [N, O, H', W']."""
        return convolve(x, self.weight, self.bias, offsets, self.stride, self.padding)

    def extra_repr(self) -> str:
        return (
            f"weight={list(self.weight.shape)}, stride={self.stride}, padding={self.padding}, "
            f"bias={self.bias is not None}"
        )


class ExpertBatchNorm2d(WithStatistics):
    """Batch normalisation per expert: parameters and running statistics [E, C], `num_batches_tracked` [E].

    The running statistics of an expert without rows in a batch do not change.

    Args:
        num_experts: number of experts E.
        num_features: channels C.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics.
        affine: whether there are a weight and a bias.
        device, dtype: those of the parameters and running statistics.
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
        check.count("num_experts", num_experts, 1)
        check.count("num_features", num_features, 0)
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


class ExpertLayerNorm(nn.Module):
    """Layer normalisation per expert over the last dimension: `weight` and `bias` [E, C].

    Args:
        num_experts: number of experts E.
        num_features: size of the last dimension, C.
        eps: added to the variance.
        device, dtype: those of the parameters.
    """

    def __init__(
        self,
        num_experts: int,
        num_features: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.count("num_experts", num_experts, 1)
        check.count("num_features", num_features, 1)
        self.num_experts, self.eps = num_experts, eps
        self.weight = nn.Parameter(torch.ones(num_experts, num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_experts, num_features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, T, C] sorted by expert -> the same shape."""
        num_experts, num_features = self.weight.shape
        check.shape("x", x, (None, None, num_features), "[N, T, C]")
        check.offsets(offsets, num_experts, x)
        if check.may_read(offsets):
            check.ranges(offsets.tolist(), len(x))
        weight, bias = (parameter_of_each_row(p, offsets, len(x))[:, None] for p in (self.weight, self.bias))
        return recomputed(_scaled, recomputed(self._normalised, x), weight, bias)

    def _normalised(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, eps={self.eps}"


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, stride: Pixels, padding: Pixels
) -> Tensor:
    """x [N, C, H, W], weight [E, O, C, kh, kw] -> [N, O, H', W'], by the faster operator."""
    if saves_work(x, weight, stride, padding):
        return winograd_conv2d(x, weight, bias, offsets, padding)
    return expert_conv2d(x, weight, bias, offsets, stride, padding)


def reset_like_torch(weight: Tensor, bias: Tensor | None) -> None:
    """The initial values of nn.Linear and nn.Conv2d: uniform within +-1 / sqrt(fan_in), with one expert's fan-in."""
    fan_in = weight.shape[2:].numel()
    bound = 1 / math.sqrt(fan_in) if fan_in > 0 else 0.0
    nn.init.uniform_(weight, -bound, bound)
    if bias is not None:
        nn.init.uniform_(bias, -bound, bound)


def parameter_of_each_row(parameter: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """For every row, its expert's part of the parameter [E, ...] -> [rows, ...]."""
    (parameter,) = cast_for_autocast(parameter)
    return expand_to_rows(parameter.flatten(1), offsets, rows).unflatten(1, parameter.shape[1:])


def _scaled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * weight + bias
