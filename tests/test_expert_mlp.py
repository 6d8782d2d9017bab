"""The expert MLP beyond the common contract: what it saves, threads, gradients of the gates, compilation, errors."""

import re
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_kernels import ExpertMLP, RobustMoE, Routing, attack_mode, reference
from moe_kernels.ops import expert_mlp, expert_mlp_output, group_by_expert
from moe_kernels.testing import Source, check_threads
from moe_kernels.testing.saved import saved_bytes

T, D, N, E, K = 24, 5, 16, 3, 2
INDICES = 4 * (E + 1) + 3 * 4 * T * K  # offsets; gate, position and row of each slot


def moe_and_routing(activation: str, dtype: torch.dtype, **options: str) -> tuple[RobustMoE, Tensor, Routing]:
    moe = RobustMoE(D, N, E, K, activation=activation, dtype=dtype, **options)
    x = Source(dtype).randn(T, D).requires_grad_()
    return moe, x, moe.route(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("activation", "width"), [("gelu", N), ("relu", N), ("swiglu", 2 * N)])
def test_training_saves_x_and_the_pre_activation(activation: str, width: int, dtype: torch.dtype) -> None:
    moe, x, routing = moe_and_routing(activation, dtype)
    kept = saved_bytes(lambda: moe(x, routing=routing), apart_from=moe)
    assert kept == T * (D + width * K) * dtype.itemsize + INDICES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("activation", "width"), [("gelu", N), ("relu", N), ("geglu", 2 * N)])
def test_an_attack_saves_the_pre_activation(activation: str, width: int, dtype: torch.dtype) -> None:
    moe, x, _ = moe_and_routing(activation, dtype)
    with attack_mode(moe):
        routing = moe.route(x)
        assert routing.weights.requires_grad
        kept = saved_bytes(lambda: moe(x, routing=routing), apart_from=moe)
    assert kept == T * width * K * dtype.itemsize + INDICES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attack_on_relu_with_frozen_gates_saves_one_bit_per_element(dtype: torch.dtype) -> None:
    moe, x, routing = moe_and_routing("relu", dtype)
    with attack_mode(moe):
        kept = saved_bytes(lambda: moe(x, routing=routing.fixed(1)), apart_from=moe)
    assert kept == T * N // 8 + 4 * (E + 1) + 3 * 4 * T


def test_recompute_all_saves_only_x() -> None:
    moe, x, routing = moe_and_routing("gelu", torch.float32, recompute="all")
    kept = saved_bytes(lambda: moe(x, routing=routing), apart_from=moe)
    assert kept == 4 * T * D + INDICES
    eager, _, _ = moe_and_routing("gelu", torch.float32, recompute="none")
    assert saved_bytes(lambda: eager(x, routing=routing), apart_from=eager) == 4 * T * (D + (2 * N + D) * K) + INDICES


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "relu2", "swiglu", "geglu"])
def test_recompute_changes_no_gradient(activation: str) -> None:
    results = []
    for recompute in ("none", "activations", "all"):
        torch.manual_seed(0)
        moe, x, _ = moe_and_routing(activation, torch.float64, recompute=recompute)
        y = moe(x)
        first = torch.autograd.grad(y.square().sum(), [x, *moe.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *moe.parameters()])
        results.append((y, *first, *second))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_a_second_backward_gives_the_same_gradients() -> None:
    moe, x, _ = moe_and_routing("geglu", torch.float32)
    y = moe(x).sum()
    wanted = [x, *moe.parameters()]
    first, second = (torch.autograd.grad(y, wanted, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(first, second, strict=True))


def test_bitwise_equal_for_any_number_of_threads() -> None:
    moe = RobustMoE(33, 129, 5, 2, activation="swiglu")
    x, grad = torch.randn(301, 33, requires_grad=True), torch.randn(301, 33)
    routing = moe.route(x.detach())  # outside, since the router is a layer of torch's

    def results() -> tuple[Tensor, ...]:
        y = moe(x, routing=routing)
        return y, *torch.autograd.grad(y, [x, *moe.experts.parameters()], grad)

    check_threads(results)


def test_on_a_gpu_rows_are_activated_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_mlp, "CHUNK", 4)
    s = Source(torch.float64)
    args = s.randn(11, 6), s.randn(3, 5, 6), s.randn(3, 5), s.offsets([3, 0, 8]), "gelu", None, None, None
    torch.testing.assert_close(expert_mlp._output(*args), reference.expert_mlp_output(*args))


def test_compiles_without_a_graph_break() -> None:
    moe, x, _ = moe_and_routing("swiglu", torch.float32)
    compiled, eager = torch.compile(moe, fullgraph=True)(x), moe(x)
    torch.testing.assert_close(compiled, eager)
    wanted = [x, *moe.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), wanted) for y in (compiled, eager)))


def test_the_old_name_of_gates_still_works() -> None:
    s = Source(torch.float32)
    z, weight, offsets, gates = s.randn(4, 3), s.randn(2, 5, 3), s.offsets([1, 3]), torch.rand(4, 1)
    order, position, _ = group_by_expert(torch.tensor([[0], [1], [1], [1]]), 2)
    indices = {"position": position, "rows": order}
    expected = expert_mlp_output(z, weight, None, offsets, "gelu", gates=gates, **indices)
    mlp = ExpertMLP(2, 5, 3)
    for function, args in ((expert_mlp_output, (z, weight, None, offsets, "gelu")), (mlp.down, (z, offsets))):
        options = indices if function is expert_mlp_output else indices | {"activation": "gelu"}
        with pytest.warns(DeprecationWarning, match="weights is called gates"):
            found = function(*args, weights=gates, **options)
        assert torch.equal(found, function(*args, gates=gates, **options))
        with pytest.raises(TypeError, match="got both gates and weights"):
            function(*args, weights=gates, gates=gates, **options)
    assert torch.equal(expected, expert_mlp_output(z, weight, None, offsets, "gelu", gates, position, order))
    x = s.randn(4, 5)
    with pytest.warns(DeprecationWarning, match="weights is called gates"):
        found = mlp(x, offsets, order, weights=gates, position=position)
    assert torch.equal(found, mlp(x, offsets, order, gates, position))
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    assert torch.equal(found, compiled(x, offsets, order, weights=gates, position=position))


def test_the_warning_is_shown_at_the_users_line(capfd: pytest.CaptureFixture[str]) -> None:
    """By Python's own filters, which show it where it comes from a script, and at each line once."""
    script = """
import torch, moe_kernels
from moe_kernels.ops import group_by_expert
mlp, gates = moe_kernels.ExpertMLP(2, 4, 3), torch.rand(2, 1)
order, position, offsets = group_by_expert(torch.tensor([[1], [0]]), 2)
for _ in range(2):
    mlp(torch.rand(2, 4), offsets, order, weights=gates, position=position)
    mlp.down(torch.rand(2, 3), offsets, order, "gelu", weights=gates, position=position)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    shown = re.findall(r"<string>:(\d+): DeprecationWarning: forward: weights is called gates", capfd.readouterr().err)
    assert shown == ["7", "8"]


def test_bad_input_says_what_was_expected() -> None:
    s = Source(torch.float32)
    z, weight, offsets = s.randn(4, 6), s.randn(2, 3, 6), s.offsets([1, 3])
    order, position, _ = group_by_expert(torch.tensor([[0], [1], [1], [1]]), 2)
    weights = torch.ones(4, 1)
    for match, args in {
        "activation must be one of relu, .*, got 'tanh'": (z, weight, None, offsets, "tanh"),
        r"weight must be \[E, d, n\] .* here \['\*', '\*', 3\], got": (z, weight, None, offsets, "swiglu"),
        r"bias must be \[E, d\], here \[2, 3\]": (z, weight, weights, offsets, "gelu"),
        r"offsets must be int32 of shape \[3\]": (z, weight, None, offsets[1:], "gelu"),
        "position and rows must be given with gates": (z, weight, None, offsets, "gelu", weights, position),
        "gates must be given with position": (z, weight, None, offsets, "gelu", None, position, order),
        r"gates must be \[T, k\] like position": (z, weight, None, offsets, "gelu", weights[:3], position, order),
        "rows must have one index for each of the 4 rows of z, got 3": (
            *(z, weight, None, offsets, "gelu", weights, position),
            order[:3],
        ),
    }.items():
        with pytest.raises(ValueError, match=match):
            expert_mlp_output(*args)
    with pytest.raises(ValueError, match="recompute must be one of none, activations, all, got 'some'"):
        RobustMoE(4, 4, 2, recompute="some")


@pytest.mark.parametrize("combined", [False, True])
def test_the_activation_may_be_a_function(combined: bool) -> None:
    z, weight, bias, weights = (Source(torch.float64).randn(*shape) for shape in ((6, 4), (E, 2, 2), (E, 2), (3, K)))
    order, position, offsets = group_by_expert(torch.tensor([[0, 2], [2, 0], [0, 2]]), E)
    route = (position, order // K) if combined else (None, None)

    def output(activation: Any, *inputs: Tensor) -> Tensor:
        return expert_mlp_output(*inputs[:3], offsets, activation, inputs[3] if combined else None, *route)

    def swiglu(z: Tensor) -> Tensor:
        assert z.shape[1] == 4
        return torch.nn.functional.silu(z[:, :2]) * z[:, 2:]

    inputs = [t.requires_grad_() for t in (z, weight, bias, weights)][: 3 + combined]
    results = []
    for activation in (swiglu, "swiglu"):
        y = output(activation, *inputs)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    torch.testing.assert_close(*results)
    assert torch.autograd.gradgradcheck(partial(output, swiglu), inputs)
    for one in inputs:  # each alone, all else frozen
        frozen = [t if t is one else t.detach() for t in inputs]
        named, own = (torch.autograd.grad(output(a, *frozen).square().sum(), one) for a in ("swiglu", swiglu))
        torch.testing.assert_close(own, named)
