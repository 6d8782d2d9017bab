"""The second half of an expert MLP: out[t] = sum over i of gates[t, i] * (weight[e] @ act(z[j]) + bias[e]).

j = position[t, i] is a sorted row of expert e. Of what has a row per slot, only z and the indices are saved for the
backward: act(z) is recomputed, and the gate's gradient <weight[e].T @ dout[t], act(z[j])> does not need the expert's
output.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kernels import _checks as check
from moe_kernels import backends, reference
from moe_kernels._deprecated import renamed_argument
from moe_kernels._library import define
from moe_kernels._torch import capture_autocast, cast_for_autocast, inside_transform, vjp
from moe_kernels.ops.combine import combine_input_grad, combine_unchecked, combine_weight_grad
from moe_kernels.ops.expert_linear import expert_linear_unchecked, expert_linear_weight_grad
from moe_kernels.reference.expert_mlp import GATED, activate

ACTIVATIONS = ("relu", "gelu", "silu", "relu2", *GATED)
CHUNK = 1 << 16  # on a GPU, activations exist for at most this many sorted rows at a time


@renamed_argument("weights", "gates")
def expert_mlp_output(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    activation: str | Callable[[Tensor], Tensor],
    gates: Tensor | None = None,
    position: Tensor | None = None,
    rows: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Activates a batch sorted by expert, applies each expert's linear map and, with `gates`, combines the slots.

    Args:
        z: [N, n] pre-activations, rows sorted by expert; [N, 2 n] for a gated activation; [N, m] for a function that
            turns m columns into n.
        weight: [E, d, n].
        bias: [E, d] or None.
        offsets: int32 [E + 1]; rows offsets[e] to offsets[e + 1] belong to expert e.
        activation: relu, gelu (exact), silu, relu2 (squared relu), or gated: swiglu, geglu, which multiply the
            activation of z's first half by its second half; or any differentiable function of z without parameters
            that treats each row by itself. The backward calls it again.
        gates: [T, k] with T * k = N, or None to return the sorted rows.
        position: int32 [T, k], the sorted place of each slot; required with gates.
        rows: int32 [N], the row t that sorted row j belongs to: position's inverse divided by k; required with gates.
        backend: None for the fastest on z's device, or "reference".

    Returns:
        [T, d]; without gates [N, d].

    Raises:
        ValueError: if the activation is unknown, or a shape, dtype or device does not match.
    """
    check.ndim("z", z, 2)
    check.ndim("weight", weight, 3)
    if not callable(activation):
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, or a function of z, got {activation!r}"
            )
        width = z.shape[1] // 2 if activation in GATED else z.shape[1]
        check.shape("weight", weight, (None, None, width), "[E, d, n] with n the width of act(z)")
        check.shape("z", z, (None, 2 * width if activation in GATED else width), "[N, 2 n] of a gated activation")
    check.same_kind("weight", weight, "z", z)
    if bias is not None:
        check.shape("bias", bias, tuple(weight.shape[:2]), "[E, d]")
        check.same_kind("bias", bias, "z", z)
    check.offsets(offsets, weight.shape[0], z)
    if gates is not None:
        if position is None or rows is None:
            raise ValueError("position and rows must be given with gates, got None")
        check.floating("gates", gates)
        check.shape("gates", gates, tuple(position.shape), "[T, k] like position")
        check.same_device("gates", gates, "z", z)
        check.indices("position", position, z, ndim=2, like_name="z")
        check.indices("rows", rows, z, ndim=1, like_name="z")
        for name, count in (("position", position.numel()), ("rows", rows.numel())):
            if count != z.shape[0]:
                raise ValueError(f"{name} must have one index for each of the {z.shape[0]} rows of z, got {count}")
    elif position is not None or rows is not None:
        raise ValueError("gates must be given with position and rows, got None")
    z, weight, bias = cast_for_autocast(z, weight, bias)
    function = backends.choose("expert_mlp_output", backend, z)
    if callable(activation) and backend is None:
        function = _output if inside_transform() else _OutputOfFunction.apply
    return function(z, weight, bias, offsets, activation, gates, position, rows)


def _output(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    activation: str | Callable[[Tensor], Tensor],
    gates: Tensor | None,
    position: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    parts = [
        expert_linear_unchecked(
            activate(z[first : first + CHUNK], activation),
            weight,
            bias,
            offsets.clamp(first, first + CHUNK) - first,
            None,
        )
        for first in range(0, max(z.shape[0], 1), CHUNK)
    ]
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y if gates is None else combine_unchecked(y, gates, position)


def _output_fake(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    activation: str,
    gates: Tensor | None,
    position: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    return z.new_empty((z if gates is None else gates).shape[0], weight.shape[1])


def _output_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, weight, bias, offsets, ctx.activation, gates, position, rows = inputs
    z_needs, weight_needs, _, _, _, gates_needs = ctx.needs_input_grad[:6]
    through = z_needs or weight_needs or gates_needs
    ctx.save_for_backward(
        z if through else None,
        weight if through else None,
        bias if gates_needs else None,
        offsets,
        gates,
        position,
        rows,
    )


def _output_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, weight, bias, offsets, gates, position, rows = ctx.saved_tensors
    z_needs, weight_needs, bias_needs, _, _, gates_needs = ctx.needs_input_grad[:6]
    dz = dweight = dbias = dgates = None
    wide = torch.promote_types(grad.dtype, torch.float32)
    if gates is None:
        s = grad.new_ones(grad.shape[0], dtype=wide)
    else:
        one = grad.new_ones(grad.shape[0], dtype=wide)
        s = combine_input_grad(one, gates, position)  # [N], the gates in sorted order
    if z_needs or weight_needs or gates_needs:
        da = expert_linear_unchecked(grad, weight.transpose(1, 2), None, offsets, rows)
        needed = (z_needs, weight_needs, gates_needs)
        hidden_grad = _hidden_grad_of_function if callable(ctx.activation) else expert_mlp_hidden_grad
        dz, weighted_a, ds = hidden_grad(da, z, s, ctx.activation, *needed)
        if weight_needs:
            dweight = expert_linear_weight_grad(weighted_a, grad, offsets, rows).transpose(1, 2)
        if gates_needs:
            if bias is not None:
                ds = ds + expert_linear_unchecked(grad, bias.unsqueeze(1), None, offsets, rows).squeeze(1)
            dgates = combine_weight_grad(one, ds, position).to(gates.dtype)
    if bias_needs:
        dbias = expert_linear_weight_grad(s.unsqueeze(1).to(grad.dtype), grad, offsets, rows).squeeze(1)
    return dz if z_needs else None, dweight, dbias, None, None, dgates, None, None


def _hidden_grad_of_function(
    da: Tensor, z: Tensor, gates: Tensor, activation: Any, z_needs: bool, weight_needs: bool, gates_needs: bool
) -> tuple[Tensor | None, ...]:
    """`expert_mlp_hidden_grad` for an activation that is a function, by autograd."""
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        leaf = z if twice and z.requires_grad else z.detach().requires_grad_()
        a = activation(leaf)
    s = gates[:, None].to(da.dtype)
    dz = torch.autograd.grad(a, leaf, s * da, create_graph=twice)[0] if z_needs else None
    a = a if twice else a.detach()
    weighted = s * a if weight_needs else None
    return dz, weighted, (da.to(gates.dtype) * a.to(gates.dtype)).sum(1) if gates_needs else None


class _OutputOfFunction(torch.autograd.Function):
    """`expert_mlp_output` with a function as its activation, which an operator of torch cannot take as an argument."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        function, autocast = inputs[4], capture_autocast(inputs[0].device.type)

        def activation(z: Tensor) -> Tensor:
            with autocast():
                return function(z)

        inputs = (*inputs[:4], activation, *inputs[5:])
        output = _output(*inputs)
        _output_setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _output_backward(ctx, grad)


_expert_mlp_output = define(
    "expert_mlp_output(Tensor z, Tensor weight, Tensor? bias, Tensor offsets, str activation, Tensor? gates, "
    "Tensor? position, Tensor? rows) -> Tensor",
    _output_fake,
    setup_context=_output_setup_context,
    backward=_output_backward,
    composed=_output,
)


def _hidden_grad_fake(
    da: Tensor, z: Tensor, gates: Tensor, activation: str, z_needs: bool, weight_needs: bool, gates_needs: bool
) -> tuple[Tensor, ...]:
    pairs = ((z, z_needs), (da, weight_needs), (gates, gates_needs))
    return tuple(x.new_empty(x.shape if needs else (0,)) for x, needs in pairs)


def _hidden_grad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _hidden_grad_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    wanted = tuple(g if needs else None for g, needs in zip(grads, ctx.settings[1:], strict=True))
    inputs = (*ctx.saved_tensors, *ctx.settings)
    return vjp(reference.expert_mlp_hidden_grad, inputs, wanted, ctx.needs_input_grad)


expert_mlp_hidden_grad = define(
    "expert_mlp_hidden_grad(Tensor da, Tensor z, Tensor gates, str activation, bool z_needs, bool weight_needs, "
    "bool gates_needs) -> (Tensor, Tensor, Tensor)",
    _hidden_grad_fake,
    setup_context=_hidden_grad_setup_context,
    backward=_hidden_grad_backward,
    triton="expert_mlp",
)
"""da [N, n] (the gradient of act(z) before the gates), z [N, n] or [N, 2 n], gates [N] -> dz like z, gates * act(z)
[N, n] and dgates [N]; a result that is not needed is empty."""
