"""The k largest logits of each row; their weights are exp of the gate's log-probabilities, or a softmax of these."""

import torch
from torch import Tensor
from torch.nn import functional as F


def _weights(wide: Tensor, experts: Tensor, gate: str, renormalize: bool) -> Tensor:
    log_p = (F.logsigmoid(wide) if gate == "sigmoid" else wide.log_softmax(-1)).gather(-1, experts)
    return log_p.softmax(-1) if renormalize else log_p.exp()  # the softmax divides exp(log_p) by its sum


def topk_route(logits: Tensor, k: int, gate: str = "softmax", renormalize: bool | None = None) -> tuple[Tensor, Tensor]:
    renormalize = k > 1 if renormalize is None else renormalize
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    experts = wide.argsort(dim=-1, descending=True, stable=True)[:, :k]
    weights = _weights(wide, experts, gate, renormalize)
    if gate in ("hard", "straight_through"):
        one = torch.full_like(weights, 1 / k if renormalize else 1)
        weights = one if gate == "hard" else one + (weights - weights.detach())
    return weights, experts.int()


def topk_route_backward(grad: Tensor, logits: Tensor, experts: Tensor, gate: str, renormalize: bool) -> Tensor:
    wide, experts = logits.to(grad.dtype), experts.long()
    weights = _weights(wide, experts, gate, renormalize)
    ds = weights * grad
    if renormalize:
        ds = ds - weights * ds.sum(-1, keepdim=True)
    if gate == "sigmoid":
        ds = ds * torch.sigmoid(-wide.gather(-1, experts))
    dlogits = torch.zeros_like(wide).scatter(-1, experts, ds)
    if gate != "sigmoid" and not renormalize:
        dlogits = dlogits - wide.softmax(-1) * ds.sum(-1, keepdim=True)
    return dlogits.to(logits.dtype)
