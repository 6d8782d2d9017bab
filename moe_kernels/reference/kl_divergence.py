"""out[b] = sum_c p[b, c] (log p[b, c] - log q[b, c]) with p = softmax(clean), q = softmax(adv); 0 where p = 0."""

import torch
from torch import Tensor


def kl_divergence(clean_logits: Tensor, adv_logits: Tensor) -> Tensor:
    dtype = torch.promote_types(clean_logits.dtype, torch.float32)
    log_p, log_q = (logits.to(dtype).log_softmax(-1) for logits in (clean_logits, adv_logits))
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0)).sum(-1)


def kl_divergence_backward(
    grad: Tensor, clean_logits: Tensor, adv_logits: Tensor, clean_needs: bool, adv_needs: bool
) -> tuple[Tensor, Tensor]:
    """d/dclean = grad p (log p - log q - out) and d/dadv = grad (q - p); one not needed is empty."""
    dtype = torch.promote_types(clean_logits.dtype, torch.float32)
    log_p, log_q = (logits.to(dtype).log_softmax(-1) for logits in (clean_logits, adv_logits))
    p, q, grad = log_p.exp(), log_q.exp(), grad[:, None]
    ratio = torch.where(p > 0, log_p - log_q, 0)
    dclean = grad * p * (ratio - (p * ratio).sum(-1, keepdim=True)) if clean_needs else grad.new_empty(0)
    dadv = grad * (q - p) if adv_needs else grad.new_empty(0)
    return dclean.to(clean_logits.dtype), dadv.to(adv_logits.dtype)
