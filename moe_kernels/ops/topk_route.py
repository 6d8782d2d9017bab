"""Top-k routing: w[t, i] = gate(logits[t])[e] for the experts e = experts[t, i] with the k largest logits of row t."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_kernels import _checks as check
from moe_kernels import backends, reference
from moe_kernels._library import define
from moe_kernels._torch import vjp

GATES = ("softmax", "sigmoid", "hard", "straight_through", "soft")


def topk_route(
    logits: Tensor,
    k: int,
    gate: str = "softmax",
    renormalize: bool | None = None,
    *,
    bias: Tensor | None = None,
    groups: Sequence[int] | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses each row's k experts and gives them weights.

    A logit of -inf masks an expert: its probability is 0. If fewer than k are left, masked experts fill the row.

    Args:
        logits: [T, E].
        k: experts per row, 1 to E.
        gate: softmax: the probability over all E; sigmoid: each logit on its own; hard: 1, without a gradient;
            straight_through: 1, with the gradient of softmax; soft: softmax with k = E.
        renormalize: whether a row's weights are divided by their sum; None means k > 1, because a single weight
            divided by itself gives the router no gradient.
        bias: [E] or None: added to the gate's scores to choose the experts, but not to their weights, which balances
            the load without a loss (Wang et al., 2024; DeepSeek-V3).
        groups: (n, m): the experts form n groups of consecutive ones, and each row chooses from the m groups whose two
            largest scores have the largest sum (DeepSeek-V3); None for a choice from all experts.
        scale: multiplies the weights.
        backend: None for the fastest on logits' device, or "reference".

    Returns:
        weights [T, k], fp32 (fp64 for fp64 logits), and experts, int32 [T, k], in descending order of logit, or of
        score plus bias; ties go to the lowest index. With bias or groups, torch's own operators choose on every device.

    Raises:
        ValueError: if an argument is out of range or, on the CPU, a row holds NaN, +inf or nothing but -inf.
    """
    check.ndim("logits", logits, 2)
    check.floating("logits", logits)
    num_experts = logits.shape[1]
    if isinstance(k, float) or not 1 <= k <= num_experts:
        raise ValueError(f"k must be between 1 and the number of experts E = {num_experts}, got {k}")
    check.one_of("gate", gate, GATES)
    if gate == "soft":
        if k != num_experts:
            raise ValueError(f'k must be the number of experts E = {num_experts} with gate="soft", got {k}')
        gate = "softmax"
    if gate == "hard":
        logits = logits.detach()
    renormalize = k > 1 if renormalize is None else renormalize
    if bias is None and groups is None:
        weights, experts = backends.choose("topk_route", backend, logits)(logits, k, gate, renormalize)
        return weights if scale == 1 else scale * weights, experts
    if bias is not None:
        check.floating("bias", bias)
        check.shape("bias", bias, (num_experts,), "[E]")
        check.same_device("bias", bias, "logits", logits)
    if groups is not None:
        check_groups(groups, num_experts, k)
    if check.may_read(logits):
        highest = logits.detach().amax(1)  # NaN where there is one
        bad = (~highest.isfinite()).nonzero()
        if len(bad):
            raise ValueError(
                "logits must be free of NaN and +inf, with a finite entry in every row; "
                f"row {int(bad[0])} has maximum {float(highest[bad[0]])}"
            )
    return reference.topk_route(logits, k, gate, renormalize, bias, groups, scale)


def check_groups(groups: Sequence[int], num_experts: int, k: int) -> None:
    """Raises ValueError unless groups is (n, m): n equal groups of experts, with at least k experts in m of them."""
    n, m = check.pair("groups", groups, 1)
    if num_experts % n or not m <= n or k > m * (num_experts // n):
        wanted = f"n dividing E = {num_experts}, m <= n and k = {k} experts in m groups"
        raise ValueError(f"groups must be (n, m) with {wanted}, got {tuple(groups)}")


def _fake(logits: Tensor, k: int, gate: str, renormalize: bool) -> tuple[Tensor, Tensor]:
    sizes = logits.shape[0], k
    weights = logits.new_empty(sizes, dtype=torch.promote_types(logits.dtype, torch.float32))
    return weights, logits.new_empty(sizes, dtype=torch.int32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, *ctx.options = inputs
    ctx.save_for_backward(logits, output[1])


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    _, gate, renormalize = ctx.options
    return topk_route_backward(grad, *ctx.saved_tensors, gate, renormalize), None, None, None


define(
    "topk_route(Tensor logits, SymInt k, str gate, bool renormalize) -> (Tensor, Tensor)",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, logits, experts, *ctx.options = inputs
    ctx.save_for_backward(grad, logits, experts)


def _double_backward(ctx: Any, ddlogits: Tensor) -> tuple[Tensor | None, ...]:
    return vjp(
        reference.topk_route_backward, (*ctx.saved_tensors, *ctx.options), (ddlogits,), tuple(ctx.needs_input_grad)
    )


topk_route_backward = define(
    "topk_route_backward(Tensor grad, Tensor logits, Tensor experts, str gate, bool renormalize) -> Tensor",
    lambda grad, logits, experts, gate, renormalize: torch.empty_like(logits, memory_format=torch.contiguous_format),
    setup_context=_backward_setup_context,
    backward=_double_backward,
)
"""grad [T, k], logits [T, E], experts int32 [T, k], gate "softmax" or "sigmoid", renormalize -> dlogits [T, E]: the
gradient of `topk_route`'s weights."""
