"""The k largest logits of each row; their weights are exp of the gate's log-probabilities, or a softmax of these."""

import torch
from torch import Tensor
from torch.nn import functional as F


def topk_route(logits: Tensor, k: int, gate: str = "softmax", renormalize: bool | None = None) -> tuple[Tensor, Tensor]:
    renormalize = k > 1 if renormalize is None else renormalize
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    experts = wide.argsort(-1, descending=True, stable=True)[:, :k]
    log_p = (F.logsigmoid(wide) if gate == "sigmoid" else wide.log_softmax(-1)).gather(-1, experts)
    weights = log_p.softmax(-1) if renormalize else log_p.exp()  # the softmax divides exp(log_p) by its sum
    if gate in ("hard", "straight_through"):
        one = torch.full_like(weights, 1 / k if renormalize else 1)
        weights = one if gate == "hard" else one + (weights - weights.detach())
    return weights, experts.int()
