"""y[j] = conv2d(x[j], weight[e]) + bias[e] for each image j of expert e."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as conv_grad


def expert_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
) -> Tensor:
    bounds = offsets.tolist()
    parts = [
        F.conv2d(x[a:b], weight[e], None if bias is None else bias[e], stride, padding)
        for e, (a, b) in enumerate(pairwise(bounds))
    ]
    return torch.cat(parts)


def expert_conv2d_input_grad(
    grad: Tensor, weight: Tensor, offsets: Tensor, height: int, width: int, stride: list[int], padding: list[int]
) -> Tensor:
    bounds = offsets.tolist()
    sizes = [(b - a, weight.shape[2], height, width) for a, b in pairwise(bounds)]
    grads = grad.split([size[0] for size in sizes])
    parts = zip(sizes, weight, grads, strict=True)
    return torch.cat([conv_grad.conv2d_input(s, w, g, stride, padding) for s, w, g in parts])


def expert_conv2d_weight_grad(
    grad: Tensor, x: Tensor, offsets: Tensor, height: int, width: int, stride: list[int], padding: list[int]
) -> Tensor:
    bounds = offsets.tolist()
    size = (grad.shape[1], x.shape[1], height, width)
    parts = [(x[a:b], grad[a:b]) for a, b in pairwise(bounds)]
    return torch.stack([conv_grad.conv2d_weight(i, size, g, stride, padding) for i, g in parts])
