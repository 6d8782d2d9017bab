"""Sorts slots by expert: order[j] is the slot at sorted place j, position is the inverse, and offsets is where each
expert's slots begin."""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels import _checks as check
from moe_kernels import backends
from moe_kernels._library import define


class Groups(NamedTuple):
    """Slots sorted by expert, int32: the slots of expert e are order[offsets[e]:offsets[e + 1]].

    Attributes:
        order: [T * k], the slot t * k + i at each sorted place.
        position: [T, k] or [T], the sorted place of each slot: order[position[t, i]] == t * k + i.
        offsets: [E + 1], where each expert's slots begin; the last entry is T * k.
    """

    order: Tensor
    position: Tensor
    offsets: Tensor


def group_by_expert(experts: Tensor, num_experts: int, *, backend: str | None = None) -> Groups:
    """Sorts the slots t * k + i by experts[t, i]; the slots of one expert stay in ascending order.

    Args:
        experts: int32 or int64 [T, k] or [T], in [0, num_experts).
        num_experts: E, at least 1.
        backend: None for the fastest on experts' device, or "reference".

    Returns:
        `Groups`, which unpacks into order [T * k], position with the shape of experts, and offsets [E + 1], all int32.

    Raises:
        ValueError: if a shape or dtype does not match or, on the CPU, an expert is out of range.
    """
    if experts.dtype not in (torch.int32, torch.int64) or experts.ndim not in (1, 2):
        raise ValueError(
            f"experts must be an int32 or int64 tensor [T, k] or [T], got {experts.dtype} {list(experts.shape)}"
        )
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    check.not_mapped("experts", experts)
    return Groups(*backends.choose("group_by_expert", backend, experts)(experts, num_experts))


def _fake(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (experts.numel(),), experts.shape, (num_experts + 1,)
    order, position, offsets = (experts.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return order, position, offsets


define("group_by_expert(Tensor experts, SymInt num_experts) -> (Tensor, Tensor, Tensor)", _fake)
