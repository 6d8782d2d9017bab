"""Objectives that attacks ascend: one number per sample, from logits [B, C] in fp32 or wider and labels y [B]."""

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]  # logits [B, C], y [B] -> [B]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y (Carlini and Wagner 2017), above 0 if y is not predicted."""
    others = logits.scatter(1, y[:, None], -math.inf).amax(1)
    return others - logits.gather(1, y[:, None]).squeeze(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """(max_{j != y} z_j - z_y) / (z_(1) - z_(3)), invariant to shift and scale (Croce and Hein 2020, eq. 6)."""
    check_classes("dlr", logits, 3)
    first, _, third = logits.topk(3, dim=1).values.unbind(1)
    return margin(logits, y) / (first - third + 1e-12)


def dlr_towards(target: Tensor) -> Loss:
    """(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2) with a target [B] for each sample (Croce and Hein 2020, eq. 7)."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        check_classes("dlr_targeted", logits, 4)
        first, _, third, fourth = logits.topk(4, dim=1).values.unbind(1)
        aim, own = logits.gather(1, target[:, None]).squeeze(1), logits.gather(1, y[:, None]).squeeze(1)
        return (aim - own) / (first - (third + fourth) / 2 + 1e-12)

    return loss


def check_classes(name: str, logits: Tensor, least: int) -> None:
    if logits.shape[1] < least:
        raise ValueError(f"loss={name!r} needs logits of at least {least} classes, got {logits.shape[1]}")
