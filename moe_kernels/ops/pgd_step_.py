"""One step of projected gradient descent in place: x_adv <- clamp(project(x_adv + alpha * direction(grad)), bounds)."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moe_kernels import _checks as check
from moe_kernels import backends
from moe_kernels._layout import memory_format
from moe_kernels._library import define
from moe_kernels._torch import inside_transform

NORMS = ("Linf", "L2", "L1")
SPELLINGS: dict[Any, str] = {"linf": "Linf", "inf": "Linf", "l2": "L2", "2": "L2", "l1": "L1", "1": "L1"}
SPELLINGS |= {math.inf: "Linf", 2: "L2", 1: "L1"}


def pgd_step_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: float | Tensor,
    alpha: float | Tensor,
    norm: str = "Linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    *,
    normalize: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Moves x_adv up the gradient, back into the eps-ball around x, then into the bounds, in one pass and in place.

    The direction is sign(grad) for Linf and grad / ||grad|| per sample for L2 and L1, where a zero gradient gives no
    step. The L1 projection is exact (Duchi et al., ICML 2008). NaN elements of grad count as 0. Results are rounded
    towards x, so that rounding does not leave the ball. Not differentiable: grad and x are taken as constants.

    Args:
        x_adv: [B, ...], float32 or float64, overwritten.
        grad: [B, ...], any floating-point dtype; the gradient of the loss, negated to descend.
        x: [B, ...], the clean samples, with the dtype of x_adv.
        eps: radius of the ball in the units of x; a float, or [B].
        alpha: length of the step in the units of x; a float, or [B].
        norm: "Linf", "L2" or "L1".
        bounds: (low, high), the valid range of an element.
        normalize: (mean, std), each [C], for x_adv [B, C, ...]: the same pass also writes the model's next input,
            (x_adv - mean) / std per channel, in the dtype of grad. For Linf, grad may be the gradient at that input,
            since only its sign is used; for L2 and L1, divide such a gradient by std first.
        backend: None for the fastest on x_adv's device, or "reference".

    Returns:
        x_adv, or the model's next input if normalize is given.

    Raises:
        ValueError: if a shape, dtype, device, the norm or the bounds do not fit, eps or alpha is negative or NaN, or
            std is not positive (the values of tensors on a GPU are not checked).
        RuntimeError: if x_adv requires grad while grad mode is on.
    """
    if x_adv.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "x_adv must be float32 or float64 (rounding to bfloat16 leaves a ball of 8/255 by up to 5.8 %), "
            f"got {x_adv.dtype}"
        )
    if x_adv.ndim == 0:
        raise ValueError("x_adv must be [B, ...], got a scalar")
    if torch.is_grad_enabled() and x_adv.requires_grad:
        raise RuntimeError("x_adv must not require grad: pgd_step_ overwrites it; call it under torch.no_grad()")
    if inside_transform() and any(forward_ad.unpack_dual(t).tangent is not None for t in (x_adv, grad, x)):
        raise RuntimeError("x_adv, grad and x must have no tangent: pgd_step_ has no derivative; detach them")
    strides = x_adv.stride()
    if 0 in strides and any(s == 0 and size > 1 for s, size in zip(strides, x_adv.shape, strict=True)):
        raise ValueError(f"x_adv must not be expanded, since it is overwritten, got strides {list(strides)}")
    for name, tensor in (("grad", grad), ("x", x)):
        check.shape(name, tensor, tuple(x_adv.shape), "of the shape of x_adv")
        check.same_device(name, tensor, "x_adv", x_adv)
        check.floating(name, tensor)
    if x.dtype != x_adv.dtype:
        raise ValueError(f"x must have the dtype of x_adv, {x_adv.dtype}, got {x.dtype}")
    if norm_name(norm) not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    norm = norm_name(norm)
    check.bounds(bounds, equal=True)
    low, high = bounds
    eps, alpha = _radius("eps", eps, x_adv), _radius("alpha", alpha, x_adv)
    tables = (
        ()
        if normalize is None
        else tuple(_per_channel(name, table, x_adv) for name, table in zip(("mean", "std"), normalize, strict=True))
    )
    return step_unchecked_(x_adv, grad, x, eps, alpha, norm, (float(low), float(high)), *tables, backend=backend)


def step_unchecked_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: Tensor,
    alpha: Tensor,
    norm: str,
    bounds: tuple[float, float],
    *tables: Tensor,
    backend: str | None = None,
) -> Tensor:
    """`pgd_step_` without the checks, for an attack's later steps; eps and alpha are [1] or [B] in x_adv's dtype."""
    if not (torch.compiler.is_compiling() or x_adv.is_inference()):
        torch.autograd.graph.increment_version(x_adv)  # a backward that needs the old values then raises
    with torch.no_grad():
        if tables:
            return backends.choose("pgd_step_normalized_", backend, x_adv)(
                x_adv, grad, x, eps, alpha, norm, bounds, *tables
            )
        backends.choose("pgd_step_", backend, x_adv)(x_adv, grad, x, eps, alpha, norm, bounds)
        return x_adv


def norm_name(norm: object) -> Any:
    """The name in NORMS of a norm that may be written "linf", "l2", 2, float("inf") ...; an unknown one as it is."""
    known = isinstance(norm, str | Real) and not isinstance(norm, bool)
    return SPELLINGS.get(norm.lower() if isinstance(norm, str) else norm, norm) if known else None


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


def _per_channel(name: str, value: Tensor, x_adv: Tensor) -> Tensor:
    """[C] in x_adv's dtype."""
    if x_adv.ndim < 2:
        raise ValueError(f"x_adv must be [B, C, ...] where normalize is given, got shape {list(x_adv.shape)}")
    check.shape(name, value, (x_adv.shape[1],), "[C], one per channel of x_adv")
    check.floating(name, value)
    check.same_device(name, value, "x_adv", x_adv)
    return value.to(x_adv.dtype)


_pgd_step_ = define(
    "pgd_step_(Tensor(a!) x_adv, Tensor grad, Tensor x, Tensor eps, Tensor alpha, str norm, float[] bounds) -> ()",
    lambda x_adv, grad, x, eps, alpha, norm, bounds: None,
)


def _normalized_fake(x_adv: Tensor, grad: Tensor, *_: Any) -> Tensor:
    layout = memory_format(x_adv)
    return torch.empty(x_adv.shape, dtype=grad.dtype, device=x_adv.device, memory_format=layout)


pgd_step_normalized_ = define(
    "pgd_step_normalized_(Tensor(a!) x_adv, Tensor grad, Tensor x, Tensor eps, Tensor alpha, str norm, float[] bounds, "
    "Tensor mean, Tensor std) -> Tensor",
    _normalized_fake,
)
"""`pgd_step_` with normalize=(mean, std), without its checks: eps and alpha are [1] or [B], mean and std [C], all in
x_adv's dtype. Overwrites x_adv and returns the model's next input."""
