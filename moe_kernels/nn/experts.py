"""Grouped feed-forward layers: every parameter is its plain layer's with a leading expert dimension [E]."""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_kernels import _checks as check
from moe_kernels.nn.recompute import RECOMPUTE, Recomputing, recomputed
from moe_kernels.ops import combine, expert_linear, mask_relu
from moe_kernels.ops.expert_mlp import ACTIVATIONS, GATED, activate, expert_mlp_output


def reset_like_torch(weight: Tensor, bias: Tensor | None) -> None:
    """The initial values of nn.Linear and nn.Conv2d, of one expert's fan-in: both uniform within 1 / sqrt(fan_in)."""
    fan_in = weight.shape[2:].numel()
    bound = 1 / math.sqrt(fan_in) if fan_in > 0 else 0.0
    nn.init.uniform_(weight, -bound, bound)
    if bias is not None:
        nn.init.uniform_(bias, -bound, bound)


class ExpertLinear(nn.Module):
    """A linear layer per expert: `weight` [E, out, in], `bias` [E, out] or None.

    Args:
        num_experts: number of experts E.
        in_features: width of x.
        out_features: width of the result.
        bias: whether there is a bias.

    Attributes:
        init_std: the deviation of the weight that `reset_parameters` draws, beside a bias of zero; None for the values
            of nn.Linear.
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
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init_std is None:
            reset_like_torch(self.weight, self.bias)
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


class ExpertOutput(ExpertLinear):
    """The second layer of an expert MLP."""

    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        rows: Tensor | None = None,
        activation: str | None = None,
        weights: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """As of `ExpertLinear`; with an activation, as `moe_kernels.ops.expert_mlp_output`."""
        if activation is None:
            return super().forward(x, offsets, rows)
        return expert_mlp_output(x, self.weight, self.bias, offsets, activation, weights, position, rows)


class ExpertMLP(nn.Module):
    """A two-layer feed-forward block per expert: `up` [E, hidden or 2 hidden, dim], `down` [E, dim, hidden].

    Args:
        num_experts: number of experts E.
        dim: width of x and of the result.
        hidden_dim: width between the two layers.
        activation: relu, gelu (exact), silu, relu2 (squared relu), or gated: swiglu, geglu, which multiply the
            activation of the first half of `up`'s result by its second half.
        bias: whether the layers have biases.
        recompute: what the backward computes again instead of keeping it: "none"; "activations", which keeps x and the
            result of `up` but not its activation, nor the result of `down` for the gradient of the gate; "all", which
            keeps x alone.

    Raises:
        ValueError: if a size is less than 1, or the activation or recompute is unknown.
    """

    combines = True

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        activation: str = "gelu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: str = "activations",
    ) -> None:
        super().__init__()
        check.one_of("activation", activation, ACTIVATIONS)
        check.one_of("recompute", recompute, RECOMPUTE)
        for name, size in (("num_experts", num_experts), ("dim", dim), ("hidden_dim", hidden_dim)):
            check.count(name, size, 1)
        self.num_experts, self.activation, self.recompute = num_experts, activation, recompute
        self.up = ExpertLinear(num_experts, dim, hidden_dim * (1 + (activation in GATED)), bias, device, dtype)
        self.down = ExpertOutput(num_experts, hidden_dim, dim, bias, device, dtype)

    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        rows: Tensor | None = None,
        weights: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """x [N, dim] sorted by expert -> [N, dim]; with `rows` [N], slot j reads x[rows[j]].

        With the gate's `weights` and the slots' `position`, [T, k] with T * k = N, the slots of each of x's T rows are
        combined -> [T, dim].
        """
        arguments = (x, offsets, rows, weights, position)
        if self.recompute == "all" and torch.is_grad_enabled() and torch.compiler.is_compiling():
            return checkpoint(self._forward, *arguments, use_reentrant=False, preserve_rng_state=False)
        with Recomputing(self, self.recompute == "all"):
            return self._forward(*arguments)

    def _forward(
        self, x: Tensor, offsets: Tensor, rows: Tensor | None, weights: Tensor | None, position: Tensor | None
    ) -> Tensor:
        hidden = recomputed(self.up, x, offsets, rows)
        learns = self.down.weight.requires_grad or (weights is not None and weights.requires_grad)
        if self.recompute == "none" or (self.activation == "relu" and not learns):  # whose gradient needs one bit
            a = mask_relu(hidden) if self.activation == "relu" else activate(hidden, self.activation)
            y = self.down(a, offsets)
            return y if weights is None or position is None else combine(y, weights, position)
        rows = None if weights is None else rows
        return self.down(hidden, offsets, rows, self.activation, weights, position)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, recompute={self.recompute!r}"
