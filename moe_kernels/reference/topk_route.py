"""The k largest logits of each row, weighted by the gate's probabilities, renormalized over the k on request."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def _weights(wide: Tensor, experts: Tensor, gate: str, renormalize: bool) -> Tensor:
    log_p = (F.logsigmoid(wide) if gate == "sigmoid" else wide.log_softmax(-1)).gather(-1, experts)
    return log_p.softmax(-1) if renormalize else log_p.exp()  # the softmax divides exp(log_p) by its sum


def _choice(wide: Tensor, gate: str, bias: Tensor | None, groups: Sequence[int] | None) -> Tensor:
    """[T, E], whose k largest entries choose the experts: the gate's scores plus the bias, and -inf outside the row's
    groups. These are the groups[1] groups in which the two largest entries have the largest sum (DeepSeek-V3, section
    2.1.2, which sums as many entries as a row has experts per group: two there)."""
    scores = torch.sigmoid(wide) if gate == "sigmoid" else wide.softmax(-1)
    scores = scores if bias is None else scores + bias
    choice = scores.masked_fill(wide == -torch.inf, torch.finfo(scores.dtype).min)
    if groups is None:
        return choice
    of_group = scores.unflatten(-1, (groups[0], -1))
    best = of_group.topk(min(2, of_group.shape[-1]), -1).values.sum(-1)
    outside = best.argsort(dim=-1, descending=True, stable=True)[:, groups[1] :]
    inside = torch.ones_like(best, dtype=torch.bool).scatter(-1, outside, False)
    return choice.masked_fill(~inside.repeat_interleave(of_group.shape[-1], -1), -torch.inf)


def topk_route(
    logits: Tensor,
    k: int,
    gate: str = "softmax",
    renormalize: bool | None = None,
    bias: Tensor | None = None,
    groups: Sequence[int] | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    renormalize = k > 1 if renormalize is None else renormalize
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    choice = wide if bias is None and groups is None else _choice(wide.detach(), gate, bias, groups)
    experts = choice.argsort(dim=-1, descending=True, stable=True)[:, :k]
    weights = _weights(wide, experts, gate, renormalize)
    if gate in ("hard", "straight_through"):
        one = torch.full_like(weights, 1 / k if renormalize else 1)
        weights = one if gate == "hard" else one + (weights - weights.detach())
    return scale * weights, experts.int()


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
