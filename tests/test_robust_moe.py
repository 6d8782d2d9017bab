"""RobustMoE equals a plain loop over experts, forward and backward, in every way it can be called."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_kernels import ExpertMLP, ExpertResNet18, RobustMoE, Routing
from moe_kernels.testing import InOrder, assert_equals, assert_matches


def plain_moe(moe: RobustMoE, x: Tensor, routing: Routing) -> Tensor:
    """The definition: every row through its experts, one at a time, by torch's own layers."""
    experts = moe.experts
    assert isinstance(experts, ExpertMLP)
    rows = x.reshape(-1, x.shape[-1])
    out = []
    for t, row in enumerate(rows):
        y = torch.zeros_like(row)
        for weight, e in zip(routing.weights[t], routing.experts[t].tolist(), strict=True):
            h = nn.functional.linear(row, experts.up.weight[e], experts.up.bias[e])
            y = y + weight.to(y) * nn.functional.linear(
                nn.functional.gelu(h), experts.down.weight[e], experts.down.bias[e]
            )
        out.append(y)
    return torch.stack(out).reshape(x.shape)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "hard", "straight_through"])
def test_equals_a_loop_over_rows(top_k: int, gate: str) -> None:
    moe = RobustMoE(6, 10, 4, top_k, gate=gate)
    x = torch.randn(3, 5, 6, requires_grad=True)
    grad = torch.randn(3, 5, 6)

    def run(model: RobustMoE, x: Tensor, grad: Tensor, plain: bool) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        routing = model.route(x)
        y = plain_moe(model, x, routing) if plain else model(x, routing=routing)
        wanted = [x, *model.experts.parameters()]
        if gate != "hard":
            wanted += [*model.router.parameters()]
        return (y, *torch.autograd.grad(y, wanted, grad))

    exact = run(copy.deepcopy(moe).double(), x.double(), grad.double(), plain=True)
    with InOrder():
        low = run(moe, x, grad, plain=True)
    assert_matches(run(moe, x, grad, plain=False), low, exact, torch.float32)
    assert torch.equal(moe(x), moe(x, routing=moe.route(x)))


def test_soft_gate_runs_all_experts() -> None:
    moe = RobustMoE(6, 10, 4, 4, gate="soft")
    x = torch.randn(7, 6)
    routing = moe.route(x)
    torch.testing.assert_close(
        routing.weights, routing.logits.softmax(-1).gather(1, routing.experts.long()), check_dtype=False
    )
    torch.testing.assert_close(moe(x), plain_moe(moe, x, routing))


def test_forced_routes() -> None:
    moe = RobustMoE(6, 10, 4, 1)
    x = torch.randn(9, 6)
    routing = moe.route(x, top_k=2)
    second = routing.select(1)
    assert torch.equal(second.experts[:, 0], routing.experts[:, 1])
    torch.testing.assert_close(moe(x, routing=second), plain_moe(moe, x, second))
    fixed = routing.fixed(3)
    assert (fixed.experts == 3).all() and (fixed.weights == 1).all()
    torch.testing.assert_close(moe(x, routing=fixed), plain_moe(moe, x, fixed))


def test_from_experts_takes_a_list_of_any_modules() -> None:
    experts = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)) for _ in range(3)]
    moe = RobustMoE.from_experts(experts, nn.Sequential(nn.Flatten(), nn.Linear(108, 3)), gate="hard")
    x = torch.randn(8, 3, 6, 6)
    chosen = moe.route(x).experts[:, 0].tolist()
    expected = torch.stack([experts[e](image[None])[0] for e, image in zip(chosen, x, strict=True)])
    torch.testing.assert_close(moe(x), expected)
    assert moe(x[:0]).shape == (0, 5)
    torch.testing.assert_close(RobustMoE.from_experts(nn.ModuleList(experts), moe.router, gate="hard")(x), expected)


def test_from_experts_takes_a_grouped_network() -> None:
    experts = ExpertResNet18(3, num_classes=5, width=4)
    moe = RobustMoE.from_experts(experts, nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 3))).eval()
    x = torch.randn(6, 3, 8, 8)
    routing = moe.route(x)
    for b in range(6):
        alone = moe(x[b : b + 1], routing=moe.route(x[b : b + 1]))
        torch.testing.assert_close(moe(x)[b : b + 1], alone)
    assert routing.load.sum() == 1


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "relu2", "swiglu", "geglu"])
def test_double_backward(activation: str) -> None:
    moe = RobustMoE(3, 4, 3, 2, activation=activation, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(moe, x)
    assert torch.autograd.gradgradcheck(moe, x)


@pytest.mark.parametrize("recompute", ["activations", "all"])
def test_recompute_has_the_weights_of_the_forward(recompute: str) -> None:
    moe, x = RobustMoE(6, 10, 4, 2, recompute=recompute), torch.randn(9, 6)
    weights = {name: torch.randn_like(p).requires_grad_() for name, p in moe.named_parameters()}
    loss = torch.func.functional_call(moe, weights, (x,)).square().sum()
    found = [torch.autograd.grad(loss, list(weights.values()), retain_graph=True) for _ in range(2)]

    def plain(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        model = copy.deepcopy(moe).to(x.dtype)
        model.load_state_dict(dict(zip(weights, values, strict=True)))
        return torch.autograd.grad(plain_moe(model, x, model.route(x)).square().sum(), list(model.parameters()))

    for gradients in found:
        assert_equals(gradients, plain, (x, *weights.values()), torch.float32)


@pytest.mark.parametrize("recompute", ["activations", "all"])
def test_compiles_without_a_graph_break(recompute: str) -> None:
    moe = RobustMoE(6, 10, 4, 2, recompute=recompute)
    x = torch.randn(9, 6, requires_grad=True)
    compiled = torch.compile(moe, fullgraph=True)
    out, expected = compiled(x), moe(x)
    torch.testing.assert_close(out, expected)
    wanted = [x, *moe.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), wanted), torch.autograd.grad(expected.square().sum(), wanted)
    )


def test_autocast_deepcopy_and_save() -> None:
    moe = RobustMoE(6, 10, 4, 2)
    x = torch.randn(9, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in moe.parameters())
    assert torch.equal(copy.deepcopy(moe)(x), moe(x))
    buffer = io.BytesIO()
    torch.save(moe, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), moe(x))


def test_empty_batch_gives_zero_gradients() -> None:
    moe = RobustMoE(6, 10, 4, 2)
    moe(torch.randn(0, 6)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in moe.experts.parameters())


def test_a_row_does_not_depend_on_its_batch() -> None:
    moe = RobustMoE(6, 10, 4, 2).eval()
    x = torch.randn(64, 6)
    torch.testing.assert_close(moe(x)[:7], moe(x[:7]))


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(ValueError, match="top_k must be between 1 and num_experts = 4, got 5"):
        RobustMoE(6, 10, 4, 5)
    with pytest.raises(ValueError, match="num_experts must be an integer >= 1, got 0"):
        RobustMoE(6, 10, 0)
    with pytest.raises(ValueError, match='top_k must be num_experts = 4 with gate="soft", got 2'):
        RobustMoE(6, 10, 4, gate="soft")
    with pytest.raises(ValueError, match="activation must be one of"):
        RobustMoE(6, 10, 4, activation="tanh")
    with pytest.raises(ValueError, match="gate must be one of"):
        RobustMoE(6, 10, 4, gate="top")
    with pytest.raises(ValueError, match="experts must be a list of modules or a grouped network"):
        RobustMoE.from_experts(nn.Linear(3, 3), nn.Linear(3, 3))
    moe = RobustMoE(6, 10, 4)
    with pytest.raises(ValueError, match=r"routing must be for x's leading shape \[5\].*got logits \[7, 4\]"):
        moe(torch.randn(5, 6), routing=moe.route(torch.randn(7, 6)))
    wrong = RobustMoE(6, 10, 4, router=nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"router must return logits \[..., 4\], got shape \[5, 3\]"):
        wrong(torch.randn(5, 6))
    with pytest.raises(ValueError, match=r"x must have 6 features, got shape \[5, 7\]"):
        moe(torch.randn(5, 7))


def test_shared_experts_are_added_to_every_row() -> None:
    moe = RobustMoE(6, 10, 4, shared_experts=2)
    assert moe.shared is not None and moe.shared.up.weight.shape == (1, 20, 6)
    x, shared = torch.randn(3, 5, 6), moe.shared
    dense = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 6))
    dense.load_state_dict(
        {"0.weight": shared.up.weight[0], "0.bias": shared.up.bias[0]}
        | {"2.weight": shared.down.weight[0], "2.bias": shared.down.bias[0]}
    )
    both = moe(x)
    moe.shared = None
    torch.testing.assert_close(both, moe(x) + dense(x))


def test_the_bias_evens_out_the_load() -> None:
    moe = RobustMoE(6, 10, 4, top_k=1, gate="sigmoid", balance_bias=True)
    with torch.no_grad():
        moe.router.weight[0] += 1  # which most rows prefer at first
    x = torch.randn(400, 6) + 0.5
    first = moe.route(x).load.max()
    for _ in range(300):
        moe.update_bias(moe.route(x).load, rate=0.01)
    assert first > 0.5 and moe.route(x).load.max() < 0.3
    assert "expert_bias" in moe.state_dict()
    with pytest.raises(ValueError, match="update_bias needs a layer with balance_bias=True"):
        RobustMoE(6, 10, 4).update_bias(torch.ones(4))


def test_under_checkpoint_rows_with_tied_logits_keep_their_experts() -> None:
    """Two experts' rows of the router differ by rounding only: a router that was recomputed in a different way would
    send rows to the other expert, and the gradients would be those of another forward."""
    torch.manual_seed(0)
    moe = RobustMoE(16, 32, num_experts=4, top_k=1, activation="silu", gate="sigmoid")
    with torch.no_grad():
        moe.router.weight[1:] = moe.router.weight[0] * (1 + 2**-23 * torch.tensor([[0.0], [1.0], [-1.0]]))
    x = torch.randn(256, 16)
    assert len(set(moe.route(x).experts.flatten().tolist())) > 1
    found = []
    for run in (moe, lambda x: checkpoint(moe, x, use_reentrant=False)):
        leaf = x.clone().requires_grad_()
        moe.zero_grad()
        y = run(leaf)
        y.square().sum().backward()
        found.append([y, leaf.grad, *(p.grad for p in moe.parameters())])
    assert all(map(torch.equal, *found))
