"""An expert MLP after its first linear map: y[j] = weight[e] @ act(z[j]) + bias[e]; gradients of its z and gates."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.reference.combine import combine
from moe_kernels.reference.expert_linear import expert_linear

# {gated activation: the function of the first half of z that scales the second half}
GATED = {"swiglu": "silu", "geglu": "gelu"}


def activate(z: Tensor, activation: str | Callable[[Tensor], Tensor]) -> Tensor:
    if callable(activation):
        return activation(z)
    if activation in GATED:
        first, second = z.chunk(2, dim=-1)
        return activate(first, GATED[activation]) * second
    return torch.relu(z).square() if activation == "relu2" else getattr(F, activation)(z)


def _slope(z: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return (1 + torch.erf(z / math.sqrt(2))) / 2 + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    if activation == "silu":
        return torch.sigmoid(z) * (1 + z * torch.sigmoid(-z))
    return 2 * torch.relu(z) if activation == "relu2" else (~(z <= 0)).to(z.dtype)


def expert_mlp_output(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    activation: str | Callable[[Tensor], Tensor],
    gates: Tensor | None = None,
    position: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    y = expert_linear(activate(z, activation), weight, bias, offsets)
    return y if gates is None or position is None else combine(y, gates, position)


def expert_mlp_hidden_grad(
    da: Tensor, z: Tensor, gates: Tensor, activation: str, z_needs: bool, weight_needs: bool, gates_needs: bool
) -> tuple[Tensor, ...]:
    """dz = s da act'(z), s act(z) and <da, act(z)>; those not needed are empty."""
    s, a = gates[:, None].to(da.dtype), activate(z, activation)
    if activation in GATED:
        (first, second), name = z.chunk(2, dim=1), GATED[activation]
        dz = s * torch.cat([da * second * _slope(first, name), da * activate(first, name)], 1)
    else:
        dz = s * da * _slope(z, activation)
    results = (dz, z_needs), (s * a, weight_needs), ((da.to(gates.dtype) * a.to(gates.dtype)).sum(1), gates_needs)
    return tuple(r if needs else r.new_empty(0) for r, needs in results)
