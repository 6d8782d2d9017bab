"""One step of projected gradient descent in place: x_adv <- clamp(project(x_adv + alpha * direction(grad)), bounds)."""

import torch
from torch import Tensor

from moe_kernels import _checks as check
from moe_kernels import backends
from moe_kernels._library import define

NORMS = ("Linf", "L2", "L1")


def pgd_step_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float | Tensor,
    alpha: float | Tensor,
    norm: str = "Linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    *,
    backend: str | None = None,
) -> Tensor:
    """Moves x_adv up the gradient, back into the eps-ball around x, then into the bounds, in one pass and in place.

    The direction is sign(grad) for Linf and grad / ||grad|| per sample for L2 and L1, where a zero gradient makes no
    step. The L1 projection is exact (Duchi et al., ICML 2008). NaN elements of grad count as 0. Results are rounded
    towards x, so that rounding does not leave the ball. Not differentiable: grad and x are taken as constants.

    Args:
        x_adv: [B, ...], float32 or float64, overwritten.
        grad: [B, ...], any floating dtype; the loss's gradient, negated to descend.
        x: [B, ...], the clean samples, dtype of x_adv.
        eps: radius of the ball in the units of x; a float, or [B].
        alpha: length of the step in the units of x; a float, or [B].
        norm: "Linf", "L2" or "L1".
        bounds: (low, high), the valid range of an element.
        backend: None for the fastest on x_adv's device, or "reference".

    Returns:
        x_adv.

    Raises:
        ValueError: if a shape, dtype, device, the norm or the bounds do not fit, or eps or alpha is negative or NaN
            (tensors on a GPU are not read).
        RuntimeError: if x_adv requires grad while grad mode is on.
    """
    if x_adv.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"x_adv must be float32 or float64 (bfloat16 rounding leaves a ball of 8/255 by 5.8 %), got {x_adv.dtype}"
        )
    if x_adv.ndim == 0:
        raise ValueError("x_adv must be [B, ...], got a scalar")
    if torch.is_grad_enabled() and x_adv.requires_grad:
        raise RuntimeError("x_adv must not require grad: pgd_step_ overwrites it; call it under torch.no_grad()")
    for name, tensor in (("grad", grad), ("x", x)):
        check.shape(name, tensor, tuple(x_adv.shape), "of the shape of x_adv")
        check.same_device(name, tensor, "x_adv", x_adv)
        check.floating(name, tensor)
    if x.dtype != x_adv.dtype:
        raise ValueError(f"x must have the dtype of x_adv, {x_adv.dtype}, got {x.dtype}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    low, high = bounds
    if not low <= high:
        raise ValueError(f"bounds must be (low, high) with low <= high, got {bounds}")
    eps, alpha = _radius("eps", eps, x_adv), _radius("alpha", alpha, x_adv)
    backends.choose("pgd_step_", backend, x_adv)(x_adv, grad, x, eps, alpha, norm, (float(low), float(high)))
    return x_adv


def _radius(name: str, value: float | Tensor, x_adv: Tensor) -> Tensor:
    """[1] or [B] in x_adv's dtype."""
    if isinstance(value, Tensor):
        check.shape(name, value, (x_adv.shape[0],), "a float or [B], one per sample")
        check.floating(name, value)
        check.same_device(name, value, "x_adv", x_adv)
        return value.to(x_adv.dtype)
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return torch.full((1,), value, dtype=x_adv.dtype, device=x_adv.device)


_pgd_step_ = define(
    "pgd_step_(Tensor(a!) x_adv, Tensor grad, Tensor x, Tensor eps, Tensor alpha, str norm, float[] bounds) -> ()",
    lambda x_adv, grad, x, eps, alpha, norm, bounds: None,
)
