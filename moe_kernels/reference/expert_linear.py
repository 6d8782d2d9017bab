"""y[j] = x[j] @ weight[e].T + bias[e] for each row j of expert e."""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F


def expert_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, rows: Tensor | None = None
) -> Tensor:
    if rows is not None:
        x = x[rows]
    bounds = offsets.tolist()
    parts = [
        F.linear(x[a:b], weight[e], None if bias is None else bias[e])
        for e, (a, b) in enumerate(itertools.pairwise(bounds))
    ]
    return torch.cat(parts)


def expert_linear_weight_grad(grad: Tensor, x: Tensor, offsets: Tensor, rows: Tensor | None = None) -> Tensor:
    if rows is not None:
        x = x[rows]
    bounds = offsets.tolist()
    return torch.stack([grad[a:b].T @ x[a:b] for a, b in itertools.pairwise(bounds)])
