"""Routing, sorting and combining against torch's sort and index_add."""

import pytest
import torch
from conftest import Contest, first_is_core
from peers import combine as index_add_combine
from peers import route_and_sort
from torch import Tensor

from moe_kernels import combine, group_by_expert, topk_route
from moe_kernels.testing import Source

SHAPES = [(4096, 512, 16, 2), (4096, 1024, 64, 8)]  # tokens, width, experts, k


@pytest.mark.parametrize("shape", first_is_core(SHAPES), ids=str)
@pytest.mark.parametrize("name", ["moe_kernels", "softmax, topk, argsort, index_add"])
def test_route_group_combine(contest: Contest, shape: tuple[int, ...], name: str) -> None:
    tokens, width, experts, k = shape
    s = Source(torch.float32)
    logits, y = s.randn(tokens, experts), s.randn(tokens * k, width)

    def ours(y: Tensor = y, logits: Tensor = logits) -> Tensor:
        weights, chosen = topk_route(logits, k)
        _, position, _ = group_by_expert(chosen, experts)
        return combine(y, weights, position)

    def theirs(y: Tensor = y, logits: Tensor = logits) -> Tensor:
        weights, order, _ = route_and_sort(logits, k)
        return index_add_combine(y, weights, order)

    contest(
        f"route, group and combine {tokens} x {width}, {experts} experts, top {k}",
        {"moe_kernels": ours, "softmax, topk, argsort, index_add": theirs},
        name,
        exact=lambda: theirs(y.double(), logits.double()),
    )
