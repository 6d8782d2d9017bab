"""Batch normalisation per expert: y = (x - mean) / sqrt(var + eps) * weight + bias, with the statistics of its rows."""

from typing import Any

import torch
from torch import Tensor

from moe_kernels import _checks as check
from moe_kernels import backends, reference
from moe_kernels._layout import memory_format
from moe_kernels._library import define
from moe_kernels._torch import vjp
from moe_kernels.ops.expert_sum import expert_sum


def expert_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    offsets: Tensor,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Applies F.batch_norm to each expert's rows, with that expert's parameters and running statistics.

    In training, running statistics are updated in place as by F.batch_norm. Those of an expert without rows do not
    change; with a single value per channel, for which F.batch_norm raises, the mean is updated and the variance is not.

    Args:
        x: [N, C, *], rows sorted by expert; contiguous or channels-last, which the output keeps.
        weight: [E, C] or None for ones; the dtype of x, or float32.
        bias: [E, C] or None for zeros; the dtype of x, or float32.
        running_mean: [E, C]; may be None in training.
        running_var: [E, C]; may be None in training.
        offsets: int32 [E + 1]; rows offsets[e] to offsets[e + 1] belong to expert e.
        training: True to normalise by the batch's statistics, False for the running ones.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        backend: None for the fastest on x's device, or "reference".

    Returns:
        A tensor with the shape and dtype of x.

    Raises:
        ValueError: if a shape, dtype or device does not match, running statistics are missing, or eps is negative.
    """
    if x.ndim < 2:
        raise ValueError(f"x must have at least 2 dimensions, [N, C, *], got shape {list(x.shape)}")
    check.floating("x", x)
    num_experts, channels = max(offsets.numel() - 1, 0), x.shape[1]
    check.offsets(offsets, num_experts, x)
    tables = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, table in tables.items():
        if table is None:
            continue
        check.shape(name, table, (num_experts, channels), "[E, C] with E = len(offsets) - 1 and C = x.shape[1]")
        check.same_device(name, table, "x", x)
        if table.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name} must have the dtype of x, {x.dtype}, or be float32, got {table.dtype}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together, got one of them")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if not training and running_mean is None:
        raise ValueError("running_mean and running_var must be given when training is False, got None")
    forward = backends.choose("expert_batch_norm_forward", backend, x)
    y, mean, var = forward(x, weight, bias, running_mean, running_var, offsets, training, eps)
    if training and running_mean is not None and running_var is not None:
        count = offsets.diff().unsqueeze(1) * x.shape[2:].numel()  # values per channel, [E, 1]
        with torch.no_grad():
            _update(running_mean, mean, torch.where(count > 0, momentum, 0.0))
            unbiased = var * (count / (count - 1).clamp(min=1))
            _update(running_var, unbiased, torch.where(count > 1, momentum, 0.0))
    return y


def _update(running: Tensor, batch: Tensor, momentum: Tensor) -> None:
    running.copy_(running * (1 - momentum) + batch * momentum)


def _forward_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    offsets: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return y, _statistics(x, offsets), _statistics(x, offsets)


def _statistics(x: Tensor, offsets: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(offsets.shape[0] - 1, x.shape[1], dtype=dtype)


def _forward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, running_mean, running_var, offsets, ctx.training, ctx.eps = inputs
    _, mean, var = output
    x_needs, weight_needs, bias_needs = ctx.needs_input_grad[:3]
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(
        x if weight_needs or (x_needs and ctx.training) else None,
        weight if x_needs or weight_needs else None,
        bias if bias_needs else None,
        mean if ctx.training else running_mean,  # a buffer, which takes no extra memory
        var if ctx.training else running_var,
        offsets,
    )


def _forward_backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, var, offsets = ctx.saved_tensors
    needed = ctx.needs_input_grad
    x_needs, weight_needs, bias_needs = needed[:3]
    wide = torch.promote_types(grad.dtype, torch.float32)
    mean, var = mean.to(wide), var.to(wide)
    if torch.is_grad_enabled():
        # No wanted gradient depends on an x that was not saved, so that zeros can stand in for it.
        x = torch.zeros_like(grad).requires_grad_() if x is None else x
        inputs = (x, weight, bias, mean, var, offsets, ctx.training, ctx.eps)
        return vjp(reference.expert_batch_norm_forward, inputs, (grad, None, None), needed)
    dx = dweight = dbias = None
    batch_statistics = x_needs and ctx.training
    if weight_needs or batch_statistics:
        dbias, dweight = _param_grad(grad, x, mean, var, offsets, ctx.eps)
    elif bias_needs:
        dbias = expert_sum(grad.flatten(2).sum(2) if grad.ndim > 2 else grad, offsets)
    if batch_statistics:
        dx = _input_grad(grad, x, weight, mean, var, dbias, dweight, offsets, ctx.eps)
    elif x_needs:
        dx = _input_grad(grad, None, weight, None, var, None, None, offsets, ctx.eps)
    dweight = dweight.to(weight.dtype) if weight_needs else None  # type: ignore[union-attr]
    dbias = dbias.to(bias.dtype) if bias_needs else None  # type: ignore[union-attr]
    return dx, dweight, dbias, None, None, None, None, None


_forward = define(
    "expert_batch_norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
    "Tensor offsets, bool training, float eps) -> (Tensor, Tensor, Tensor)",
    _forward_fake,
    setup_context=_forward_setup_context,
    backward=_forward_backward,
)

_param_grad = define(
    "expert_batch_norm_param_grad(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor offsets, float eps) "
    "-> (Tensor, Tensor)",
    lambda grad, x, mean, var, offsets, eps: (torch.empty_like(mean), torch.empty_like(mean)),
)


def _input_grad_fake(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    mean: Tensor | None,
    var: Tensor,
    dbias: Tensor | None,
    dweight: Tensor | None,
    offsets: Tensor,
    eps: float,
) -> Tensor:
    return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format(grad))


_input_grad = define(
    "expert_batch_norm_input_grad(Tensor grad, Tensor? x, Tensor? weight, Tensor? mean, Tensor var, Tensor? dbias, "
    "Tensor? dweight, Tensor offsets, float eps) -> Tensor",
    _input_grad_fake,
)
