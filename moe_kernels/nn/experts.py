"""Feed-forward blocks of two layers, one per expert."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_kernels import _checks as check
from moe_kernels._deprecated import renamed_argument
from moe_kernels.nn.layers import ExpertLinear
from moe_kernels.nn.recompute import RECOMPUTE, Recomputing, recomputed
from moe_kernels.ops import combine, mask_relu
from moe_kernels.ops.expert_mlp import ACTIVATIONS, GATED, activate, expert_mlp_output


class ExpertOutput(ExpertLinear):
    """The second layer of an expert MLP."""

    @renamed_argument("weights", "gates")
    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        rows: Tensor | None = None,
        activation: str | None = None,
        gates: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """`ExpertLinear.forward` or, with an activation, `moe_kernels.ops.expert_mlp_output`."""
        if activation is None:
            return super().forward(x, offsets, rows)
        return expert_mlp_output(x, self.weight, self.bias, offsets, activation, gates, position, rows)


class ExpertMLP(nn.Module):
    """A two-layer feed-forward block per expert: `up` [E, hidden or 2 hidden, dim], `down` [E, dim, hidden].

    Args:
        num_experts: number of experts E.
        dim: width of x and of the result.
        hidden_dim: width between the two layers.
        activation: relu, gelu (exact), silu, relu2 (squared relu), or gated: swiglu, geglu, which multiply the
            activation of the first half of `up`'s result by its second half.
        bias: whether the layers have biases.
        device, dtype: those of the parameters.
        recompute: what the backward recomputes instead of saving it: "none"; "activations", which saves x and the
            result of `up`, but neither its activation nor, for the gates' gradient, the result of `down`; "all", which
            saves only x.

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

    @renamed_argument("weights", "gates")
    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        rows: Tensor | None = None,
        gates: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """x [N, dim] sorted by expert -> [N, dim]; with `rows` [N], slot j reads x[rows[j]].

        With `gates` and the slots' `position`, [T, k] with T * k = N, the slots of each of x's T rows are
        combined -> [T, dim].
        """
        arguments = (x, offsets, rows, gates, position)
        if self.recompute == "all" and torch.is_grad_enabled() and torch.compiler.is_compiling():
            return checkpoint(self._forward, *arguments, use_reentrant=False, preserve_rng_state=False)
        with Recomputing(self, self.recompute == "all"):
            return self._forward(*arguments)

    def _forward(
        self, x: Tensor, offsets: Tensor, rows: Tensor | None, gates: Tensor | None, position: Tensor | None
    ) -> Tensor:
        hidden = recomputed(self.up, x, offsets, rows)
        learns = self.down.weight.requires_grad or (gates is not None and gates.requires_grad)
        if self.recompute == "none" or (self.activation == "relu" and not learns):  # ReLU saves one bit
            a = mask_relu(hidden) if self.activation == "relu" else activate(hidden, self.activation)
            y = self.down(a, offsets)
            return y if gates is None or position is None else combine(y, gates, position)
        rows = None if gates is None else rows
        return self.down(hidden, offsets, rows, self.activation, gates, position)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, recompute={self.recompute!r}"
