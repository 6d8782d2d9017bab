"""The stable order that sorts slots by expert, the inverse of that order, and where each expert's slots begin."""

import torch
from torch import Tensor


def group_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = experts.flatten().long()
    order = ids.argsort(stable=True)
    counts = ids.bincount(minlength=num_experts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return order.int(), order.argsort().view_as(experts).int(), offsets.int()
