"""Kullback-Leibler divergence per row, from logits: KL(softmax(clean) || softmax(adv))."""

from typing import Any

import torch
from torch import Tensor

from moe_kernels import _checks as check
from moe_kernels import backends, reference
from moe_kernels._library import define
from moe_kernels._torch import vjp


def kl_divergence(clean_logits: Tensor, adv_logits: Tensor, *, backend: str | None = None) -> Tensor:
    """The divergence of each row's two class distributions, in log space; classes of clean probability 0 add 0.

    Gradients flow to both arguments; detach clean_logits if it should have none.

    Args:
        clean_logits: [B, C].
        adv_logits: [B, C], with the dtype of clean_logits.
        backend: None for the fastest on the logits' device, or "reference".

    Returns:
        [B], in nats; float32 for 16-bit logits.

    Raises:
        ValueError: if a shape, dtype or device does not match, or C = 0.
    """
    check.ndim("clean_logits", clean_logits, 2)
    check.shape("adv_logits", adv_logits, tuple(clean_logits.shape), "of the shape of clean_logits")
    if clean_logits.shape[1] == 0:
        raise ValueError(f"clean_logits must have at least one class, got shape {list(clean_logits.shape)}")
    check.same_kind("adv_logits", adv_logits, "clean_logits", clean_logits)
    dtype = torch.promote_types(clean_logits.dtype, adv_logits.dtype)  # they may differ under autocast
    clean_logits, adv_logits = clean_logits.to(dtype), adv_logits.to(dtype)
    return backends.choose("kl_divergence", backend, clean_logits)(clean_logits, adv_logits)


def _fake(clean_logits: Tensor, adv_logits: Tensor) -> Tensor:
    dtype = torch.promote_types(clean_logits.dtype, torch.float32)
    return clean_logits.new_empty(clean_logits.shape[0], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:2]
    if torch.is_grad_enabled():
        return vjp(reference.kl_divergence, ctx.saved_tensors, (grad,), needed)
    grads = _kl_divergence_backward(grad, *ctx.saved_tensors, *needed)
    return tuple(g if want else None for g, want in zip(grads, needed, strict=True))


define(
    "kl_divergence(Tensor clean_logits, Tensor adv_logits) -> Tensor",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _backward_fake(
    grad: Tensor, clean_logits: Tensor, adv_logits: Tensor, clean_needs: bool, adv_needs: bool
) -> tuple[Tensor, Tensor]:
    return (
        clean_logits.new_empty(clean_logits.shape if clean_needs else (0,)),
        adv_logits.new_empty(adv_logits.shape if adv_needs else (0,)),
    )


_kl_divergence_backward = define(
    "kl_divergence_backward(Tensor grad, Tensor clean_logits, Tensor adv_logits, bool clean_needs, bool adv_needs)"
    " -> (Tensor, Tensor)",
    _backward_fake,
)
