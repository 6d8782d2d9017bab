"""Routing: losses and load against closed forms, forced routes, torch.compile."""

import pytest
import torch
from torch import Tensor

from moe_kernels.nn.routing import Routing


def random_routing(*lead: int, experts: int = 4, k: int = 2) -> Routing:
    return Routing.from_logits(torch.randn(*lead, experts), k)


@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (0,)])
def test_leading_dimensions_are_the_rows(lead: tuple[int, ...]) -> None:
    routing = random_routing(*lead)
    rows = torch.Size(lead).numel()
    assert routing.logits.shape == (*lead, 4) and routing.num_experts == 4
    assert routing.weights.shape == routing.experts.shape == (rows, 2)


def test_load_counts_slots() -> None:
    routing = Routing.from_logits(torch.tensor([[3.0, 2.0, 1.0], [0.0, 2.0, 1.0]]), 2)
    assert torch.equal(routing.load, torch.tensor([0.25, 0.5, 0.25]))


def test_empty_batch() -> None:
    routing = random_routing(0)
    assert torch.equal(routing.load, torch.zeros(4))
    assert routing.balance_loss() == 0 and routing.z_loss() == 0


def test_balance_loss_is_least_when_even_and_greatest_when_collapsed() -> None:
    even = Routing.from_logits(20 * torch.eye(4), 1)
    collapsed = Routing.from_logits(torch.tensor([20.0, 0, 0, 0]).expand(8, 4), 1)
    torch.testing.assert_close(even.balance_loss(), torch.tensor(1.0))
    torch.testing.assert_close(collapsed.balance_loss(), torch.tensor(4.0))


def test_losses_match_their_formulas_and_reach_the_logits() -> None:
    logits = torch.randn(3, 5, 4, requires_grad=True)
    routing = Routing.from_logits(logits, 2)
    flat = logits.reshape(15, 4)
    load = torch.nn.functional.one_hot(routing.experts.long(), 4).float().mean((0, 1))
    torch.testing.assert_close(routing.balance_loss(), 4 * (load * flat.softmax(-1).mean(0)).sum())
    torch.testing.assert_close(routing.z_loss(), flat.logsumexp(-1).square().mean())
    for loss in (routing.balance_loss(), routing.z_loss()):
        (grad,) = torch.autograd.grad(loss, logits)
        assert grad.abs().sum() > 0


def test_bf16_losses_are_computed_in_fp32() -> None:
    routing = Routing.from_logits(torch.randn(6, 4).bfloat16(), 2)
    assert routing.balance_loss().dtype == routing.z_loss().dtype == routing.load.dtype == torch.float32


def test_select_takes_one_rank() -> None:
    routing = random_routing(2, 3, k=3)
    second = routing.select(1)
    assert torch.equal(second.experts, routing.experts[:, 1:2]) and torch.equal(second.weights, torch.ones(6, 1))
    assert second.logits is routing.logits
    with pytest.raises(ValueError, match=r"i must be a rank between 0 and k - 1 = 2, got 3"):
        routing.select(3)


def test_fixed_sends_every_row_to_one_expert() -> None:
    routing = random_routing(5).fixed(3)
    assert torch.equal(routing.experts, torch.full((5, 1), 3, dtype=torch.int32))
    assert torch.equal(routing.weights, torch.ones(5, 1))
    for e in (-1, 4):
        with pytest.raises(ValueError, match=rf"e must be an expert between 0 and E - 1 = 3, got {e}"):
            random_routing(5).fixed(e)


@pytest.mark.parametrize("shape", [(), (3, 0)])
def test_logits_without_experts(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"logits must be \[\.\.\., E\] with E >= 1"):
        Routing.from_logits(torch.zeros(shape), 1)


def test_a_row_is_routed_alone() -> None:
    logits = torch.randn(9, 4)
    whole, part = Routing.from_logits(logits, 2), Routing.from_logits(logits[3:5], 2)
    assert torch.equal(whole.weights[3:5], part.weights) and torch.equal(whole.experts[3:5], part.experts)


def test_is_an_argument_and_a_result_under_compile() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        second = Routing.from_logits(x, 2).select(1)
        return routing.balance_loss() + routing.z_loss() + (routing.weights.sum() * second.load).sum(), second

    x, routing = torch.randn(6, 4), random_routing(6)
    loss, second = function(x, routing)
    expected = routing.balance_loss() + routing.z_loss() + routing.weights.sum()
    torch.testing.assert_close(loss, expected)
    assert torch.equal(second.experts, Routing.from_logits(x, 2).select(1).experts)


def test_another_routing_does_not_recompile() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    function = torch.compile(lambda x, routing: x + routing.weights.sum(), backend=counter, fullgraph=True)
    for _ in range(3):
        function(torch.randn(2), random_routing(6))
    assert counter.frame_count == 1


def test_select_takes_a_rank_for_each_row() -> None:
    routing = Routing.from_logits(torch.randn(5, 4), 3)
    ranks = torch.tensor([0, 2, 1, 0, 2])
    chosen = routing.select(ranks)
    assert chosen.experts[:, 0].tolist() == [routing.experts[t, r].item() for t, r in enumerate(ranks.tolist())]
    assert (chosen.weights == 1).all()
    with pytest.raises(ValueError, match=r"i must be a rank or integers \[5\], one per row, got torch.int64 \[4\]"):
        routing.select(ranks[:4])
    with pytest.raises(ValueError, match=r"i must be ranks between 0 and k - 1 = 2, got 1 to 3"):
        routing.select(ranks + 1)


def test_cat_joins_rows() -> None:
    a, b = (Routing.from_logits(torch.randn(n, 4), 2) for n in (3, 5))
    both = Routing.cat([a, b])
    for name in ("logits", "weights", "experts"):
        assert torch.equal(getattr(both, name), torch.cat([getattr(a, name), getattr(b, name)]))
    with pytest.raises(ValueError, match="routings must be one or more with equal E and k"):
        Routing.cat([a, b.select(0)])
