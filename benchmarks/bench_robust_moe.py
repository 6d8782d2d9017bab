"""The whole layer, forward and backward, against F.grouped_mm with argsort and index_add, and against a loop."""

import copy
from functools import partial

import pytest
import torch
from conftest import Contest, first_is_core
from peers import combine as index_add_combine
from peers import grouped_mm_layer, masked_loop_layer, route_and_sort
from torch import Tensor

from moe_kernels import RobustMoE, combine, group_by_expert
from moe_kernels.testing import Source

SHAPES = [(1024, 512, 1024, 8, 2), (2048, 256, 512, 16, 2)]  # tokens, width, hidden, experts, k


@pytest.mark.parametrize("shape", first_is_core(SHAPES), ids=str)
@pytest.mark.parametrize("name", ["moe_kernels", "F.grouped_mm, argsort, index_add", "loop over experts"])
def test_forward_and_backward(contest: Contest, shape: tuple[int, ...], name: str) -> None:
    tokens, dim, hidden, experts, k = shape
    torch.manual_seed(0)
    moe = RobustMoE(dim, hidden, experts, k)
    s = Source(torch.float32)
    x, grad = s.randn(tokens, dim).requires_grad_(), s.randn(tokens, dim)

    def step(layer: RobustMoE, function: object, x: Tensor, grad: Tensor) -> Tensor:
        y = function(layer, x)  # type: ignore[operator]
        dx, *_ = torch.autograd.grad(y, [x, *layer.parameters()], grad)
        return torch.cat([y, dx]).detach()

    contest(
        f"RobustMoE forward and backward {tokens} x {dim} x {hidden}, {experts} experts, top {k}",
        {
            "moe_kernels": partial(step, moe, lambda layer, x: layer(x), x, grad),
            "F.grouped_mm, argsort, index_add": partial(step, moe, grouped_mm_layer, x, grad),
            "loop over experts": partial(step, moe, masked_loop_layer, x, grad),
        },
        name,
        exact=partial(
            step,
            copy.deepcopy(moe).double(),
            masked_loop_layer,
            x.detach().double().requires_grad_(),
            grad.double(),
        ),
        targets={"F.grouped_mm, argsort, index_add": ">= 1.3"},
    )


@pytest.mark.parametrize("name", ["moe_kernels", "route, group and combine alone"])
def test_routing_is_a_small_part(contest: Contest, name: str) -> None:
    tokens, dim, hidden, experts, k = SHAPES[0]
    torch.manual_seed(0)
    moe, s = RobustMoE(dim, hidden, experts, k), Source(torch.float32)
    x, y = s.randn(tokens, dim), s.randn(tokens * k, dim)

    def routing() -> Tensor:
        route = moe.route(x)
        _, position, _ = group_by_expert(route.experts, experts)
        return combine(y, route.weights, position)

    exact, wide = copy.deepcopy(moe).double(), x.double()

    def exact_routing() -> Tensor:
        weights, order, _ = route_and_sort(exact.router(wide), k)
        return index_add_combine(y.double(), weights, order)

    with torch.no_grad():
        contest(
            f"RobustMoE forward {tokens} x {dim} x {hidden}, {experts} experts, top {k}",
            {"moe_kernels": lambda: moe(x), "route, group and combine alone": routing},
            name,
            exact=partial(masked_loop_layer, exact, wide) if name == "moe_kernels" else exact_routing,
            targets={"route, group and combine alone": "< 0.05"},
        )
