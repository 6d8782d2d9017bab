"""out[e] = sum of x[j] over the rows of expert e; out[r] = sum of x[j] over index[j] == r."""

import itertools

import torch
from torch import Tensor


def expert_sum(x: Tensor, offsets: Tensor) -> Tensor:
    bounds = offsets.tolist()
    return torch.stack([x[a:b].sum(0) for a, b in itertools.pairwise(bounds)])


def index_sum(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    return x.new_zeros(num_rows, x.shape[1]).index_add(0, index, x)
