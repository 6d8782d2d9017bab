"""x_adv <- clamp(x + project(x_adv + alpha * direction(grad) - x, eps), bounds), in fp64, rounded once at the end."""

import math

import torch
from torch import Tensor


def _project_l1(delta: Tensor, eps: Tensor) -> Tensor:
    """Projects each row of [B, n] onto the L1 ball of radius eps [B, 1] (Duchi et al., ICML 2008)."""
    size = delta.abs()
    total = size.sort(-1, descending=True).values.cumsum(-1)
    tau = ((total - eps) / torch.arange(1, size.shape[1] + 1, device=size.device)).amax(-1, keepdim=True).clamp(min=0)
    rest = (size - tau).clamp(min=0)
    rounding = (rest.sum(-1, keepdim=True) - eps) / (rest > 0).sum(-1, keepdim=True).clamp(min=1)  # by cumsum
    return delta.sign() * (size - (tau + rounding).clamp(min=0)).clamp(min=0)


def pgd_step_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float | Tensor,
    alpha: float | Tensor,
    norm: str = "Linf",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    rows = (x.shape[0], math.prod(x.shape[1:]))
    old, clean, g = (t.reshape(rows).double() for t in (x_adv, x, grad))
    eps, alpha = (torch.as_tensor(r, dtype=g.dtype, device=g.device).expand(rows[0])[:, None] for r in (eps, alpha))
    order = {"Linf": torch.inf, "L2": 2, "L1": 1}[norm]
    g = g.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    direction = g.sign() if norm == "Linf" else g / torch.linalg.vector_norm(g, order, -1, keepdim=True)
    delta = old + alpha * direction.nan_to_num(nan=0.0) - clean
    if norm == "Linf":
        delta = delta.clamp(-eps, eps)
    elif norm == "L1" and delta.numel():
        delta = _project_l1(delta, eps)
    else:
        length = torch.linalg.vector_norm(delta, order, -1, keepdim=True)
        delta = torch.where(length > eps, delta * (eps / length), delta)
    return x_adv.copy_((clean + delta).clamp(*bounds).reshape(x.shape))


def pgd_step_normalized_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float | Tensor,
    alpha: float | Tensor,
    norm: str,
    bounds: tuple[float, float],
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """Takes the step, and returns (x_adv - mean) / std per channel, in the dtype of grad."""
    pgd_step_(x_adv, grad, x, eps, alpha, norm, bounds)
    mean, std = (t.view(-1, *[1] * (x.ndim - 2)) for t in (mean, std))
    return ((x_adv - mean) / std).to(grad.dtype)
