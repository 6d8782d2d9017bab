"""Per expert and channel: y = (x - mean) / sqrt(var + eps) * weight + bias; in training mean and var are those of x."""

from itertools import pairwise

import torch
from torch import Tensor


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
) -> Tensor:
    forward = expert_batch_norm_forward(x, weight, bias, running_mean, running_var, offsets, training, eps)
    return forward[0]


def expert_batch_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    offsets: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    bounds, wide = offsets.tolist(), torch.float64 if x.dtype == torch.float64 else torch.float32
    ones = [1] * (x.ndim - 2)
    outputs, means, variances = [], [], []
    for e, (a, b) in enumerate(pairwise(bounds)):
        rows = x[a:b].to(wide).transpose(0, 1)  # [C, n, *]
        if training:
            count = max(rows.shape[1:].numel(), 1)
            mean = rows.flatten(1).sum(1) / count
            var = (rows - mean.view(-1, 1, *ones)).square().flatten(1).sum(1) / count
        else:
            assert running_mean is not None and running_var is not None
            mean, var = running_mean[e].to(wide), running_var[e].to(wide)
        scale = torch.rsqrt(var + eps) * (1 if weight is None else weight[e].to(wide))
        y = (rows - mean.view(-1, 1, *ones)) * scale.view(-1, 1, *ones)
        y = y if bias is None else y + bias[e].to(wide).view(-1, 1, *ones)
        outputs.append(y.transpose(0, 1).to(x.dtype))
        means.append(mean)
        variances.append(var)
    return torch.cat(outputs), torch.stack(means), torch.stack(variances)


def expert_batch_norm_param_grad(
    grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, offsets: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    normal = expert_batch_norm_forward(x.to(mean.dtype), None, None, mean, var, offsets, False, eps)[0]
    bounds = offsets.tolist()
    parts = [(grad[a:b].to(mean.dtype), normal[a:b]) for a, b in pairwise(bounds)]
    over = [d for d in range(grad.ndim) if d != 1]
    return torch.stack([g.sum(over) for g, _ in parts]), torch.stack([(g * n).sum(over) for g, n in parts])


def expert_batch_norm_input_grad(
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
    g, zero = grad.to(var.dtype), torch.zeros_like(var)
    if x is not None and dbias is not None and dweight is not None:
        count = (offsets.diff() * grad.shape[2:].numel()).clamp(min=1)[:, None]
        slope = (dweight / count).to(var.dtype)
        normal = expert_batch_norm_forward(x.to(var.dtype), slope, dbias / count, mean, var, offsets, False, eps)[0]
        g = g - normal
    return expert_batch_norm_forward(g, weight, None, zero, var, offsets, False, eps)[0].to(grad.dtype)
