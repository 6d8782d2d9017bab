"""Grouped feed-forward layers: every parameter is its plain layer's with a leading expert dimension [E]."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels.ops import expert_linear, mask_relu

# name: (function, whether it gates one half of its input by the other)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "relu": (mask_relu, False),
    "gelu": (F.gelu, False),
    "silu": (F.silu, False),
    "relu2": (lambda x: mask_relu(x).square(), False),
    "swiglu": (F.silu, True),
    "geglu": (F.gelu, True),
}


def reset_like_torch(weight: Tensor, bias: Tensor | None) -> None:
    """The initial values of nn.Linear and nn.Conv2d, of one expert's fan-in: both uniform within 1 / sqrt(fan_in)."""
    fan_in = weight[0, 0].numel()
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
    """

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
        reset_like_torch(self.weight, self.bias)

    def forward(self, x: Tensor, offsets: Tensor, rows: Tensor | None = None) -> Tensor:
        """x [N, in] sorted by expert -> [N, out]; with `rows` [N], slot j reads x[rows[j]]."""
        return expert_linear(x, self.weight, self.bias, offsets, rows)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )


class ExpertMLP(nn.Module):
    """A two-layer feed-forward block per expert: `up` [E, hidden or 2 hidden, dim], `down` [E, dim, hidden].

    Args:
        num_experts: number of experts E.
        dim: width of x and of the result.
        hidden_dim: width between the two layers.
        activation: relu, gelu (exact), silu, relu2 (squared relu), or gated: swiglu, geglu, which multiply the activation
            of the first half of `up`'s result by its second half.
        bias: whether the layers have biases.

    Raises:
        ValueError: if the activation is unknown.
    """

    gathers_rows = True

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        activation: str = "gelu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.num_experts, self.activation = num_experts, activation
        width = 2 * hidden_dim if ACTIVATIONS[activation][1] else hidden_dim
        self.up = ExpertLinear(num_experts, dim, width, bias, device, dtype)
        self.down = ExpertLinear(num_experts, hidden_dim, dim, bias, device, dtype)

    def forward(self, x: Tensor, offsets: Tensor, rows: Tensor | None = None) -> Tensor:
        """x [N, dim] sorted by expert -> [N, dim]; with `rows` [N], slot j reads x[rows[j]]."""
        function, gated = ACTIVATIONS[self.activation]
        hidden = self.up(x, offsets, rows)
        if gated:
            gate, value = hidden.chunk(2, dim=1)
            return self.down(function(gate) * value, offsets)
        return self.down(function(hidden), offsets)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
