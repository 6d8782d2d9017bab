"""topk_route beyond the common contract: ties, gates in closed form, masks, gradients through the gates, errors."""

import math
from collections.abc import Callable

import pytest
import torch

from moe_kernels import reference
from moe_kernels.ops import topk_route
from moe_kernels.testing import check_threads


@pytest.mark.parametrize("backend", [None, "reference"])
def test_ties_go_to_the_lowest_index(backend: str | None) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0], [-0.0, 0.0, -1.0, 3.0]])
    _, experts = topk_route(logits, 3, backend=backend)
    assert experts.tolist() == [[1, 2, 0], [0, 1, 2], [3, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_fp32_or_wider(dtype: torch.dtype) -> None:
    weights, experts = topk_route(torch.zeros(2, 4, dtype=dtype), 2)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert experts.dtype == torch.int32


def test_gates_in_closed_form() -> None:
    logits = torch.tensor([[math.log(1.0), math.log(5.0), math.log(2.0)]])
    expected = {
        ("softmax", False): [5 / 8, 2 / 8],
        ("softmax", True): [5 / 7, 2 / 7],
        ("sigmoid", False): [5 / 6, 2 / 3],
        ("sigmoid", True): [5 / 9, 4 / 9],
        ("hard", False): [1.0, 1.0],
        ("hard", True): [0.5, 0.5],
        ("straight_through", False): [1.0, 1.0],
        ("straight_through", True): [0.5, 0.5],
    }
    for (gate, renormalize), weights in expected.items():
        torch.testing.assert_close(topk_route(logits, 2, gate, renormalize)[0], torch.tensor([weights]))
    torch.testing.assert_close(topk_route(logits, 3, "soft")[0], torch.tensor([[5 / 8, 2 / 8, 1 / 8]]))


def test_renormalize_defaults_to_more_than_one_expert() -> None:
    logits = torch.randn(5, 4)
    for k in (1, 2):
        assert torch.equal(topk_route(logits, k)[0], topk_route(logits, k, renormalize=k > 1)[0])


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_extreme_logits_stay_finite(gate: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -2e4, -1e4]], requires_grad=True)
    weights, _ = topk_route(logits, 2, gate, True)
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    (grad,) = torch.autograd.grad(weights[:, 0].sum(), logits)
    assert grad.isfinite().all()


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_minus_infinity_masks_an_expert(gate: str, renormalize: bool) -> None:
    logits = torch.tensor([[0.5, -math.inf, 1.0], [-math.inf, 2.0, -math.inf]], requires_grad=True)
    weights, experts = topk_route(logits, 2, gate, renormalize)
    assert experts.tolist() == [[2, 0], [1, 0]]
    assert weights[1, 1] == 0
    (grad,) = torch.autograd.grad((weights * torch.randn(2, 2)).sum(), logits)
    assert grad.isfinite().all() and (grad[logits.isinf()] == 0).all()


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_straight_through_is_hard_with_the_gradient_of_softmax(k: int, renormalize: bool) -> None:
    logits, cotangent = torch.randn(6, 4, requires_grad=True), torch.randn(6, k)
    weights = {g: topk_route(logits, k, g, renormalize)[0] for g in ("hard", "straight_through", "softmax")}
    assert torch.equal(weights["straight_through"], weights["hard"])
    assert not weights["hard"].requires_grad
    (through,) = torch.autograd.grad(weights["straight_through"], logits, cotangent)
    (soft,) = torch.autograd.grad(weights["softmax"], logits, cotangent)
    assert torch.equal(through, soft)


def test_a_single_renormalized_weight_has_no_gradient() -> None:
    logits = torch.randn(6, 4, requires_grad=True)
    weights, _ = topk_route(logits, 1, "softmax", True)
    (grad,) = torch.autograd.grad(weights, logits, torch.randn(6, 1))
    assert torch.equal(weights, torch.ones(6, 1)) and not grad.any()


def test_saves_only_logits_and_experts() -> None:
    saved: list[torch.Tensor] = []
    logits = torch.randn(6, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        _, experts = topk_route(logits, 2)
        topk_route(logits, 2, "hard")
    assert [(x.shape, x.dtype) for x in saved] == [(logits.shape, logits.dtype), (experts.shape, experts.dtype)]


def test_bitwise_equal_for_any_number_of_threads() -> None:
    logits, cotangent = torch.randn(4097, 17, requires_grad=True), torch.randn(4097, 2)

    def run() -> tuple[torch.Tensor, ...]:
        weights, experts = topk_route(logits, 2, renormalize=False)
        return weights, experts, *torch.autograd.grad(weights, logits, cotangent)

    check_threads(run)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: topk_route(torch.zeros(4), 1), r"logits must have 2 dimensions, got shape \[4\]"),
        (lambda: topk_route(torch.zeros(2, 4).int(), 1), "logits must be a floating-point tensor, got torch.int32"),
        (lambda: topk_route(torch.zeros(2, 4), 0), "k must be between 1 and the number of experts E = 4, got 0"),
        (lambda: topk_route(torch.zeros(2, 4), 5), "k must be between 1 and the number of experts E = 4, got 5"),
        (
            lambda: topk_route(torch.zeros(2, 4), 1, "gumbel"),
            "gate must be one of softmax, sigmoid, hard, straight_through, soft, got 'gumbel'",
        ),
        (lambda: topk_route(torch.zeros(2, 4), 2, "soft"), 'E = 4 with gate="soft", got 2'),
    ],
)
def test_errors_name_the_argument(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("row", [[0.0, math.nan], [math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_undefined_logits_name_their_first_row(row: list[float]) -> None:
    logits = torch.zeros(3000, 2)
    logits[[1500, 2900]] = torch.tensor(row)
    with pytest.raises(ValueError, match=r"logits must be free of NaN and .inf, .* row 1500 is not"):
        topk_route(logits, 1)


def test_backward_op_equals_autograd_of_the_reference() -> None:
    logits, cotangent = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randn(6, 2).double()
    for gate in ("softmax", "sigmoid", "straight_through"):
        for renormalize in (False, True):
            weights, experts = reference.topk_route(logits, 2, gate, renormalize)
            (expected,) = torch.autograd.grad(weights, logits, cotangent)
            out = reference.topk_route_backward(cotangent, logits, experts, gate, renormalize)
            torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("groups", [None, (4, 2), (2, 2), (8, 3)])
def test_bias_and_groups_choose_as_in_the_paper(gate: str, renormalize: bool, groups: tuple[int, int] | None) -> None:
    logits, bias, k = torch.randn(33, 8, dtype=torch.float64, requires_grad=True), torch.randn(8).double() / 3, 3
    weights, experts = topk_route(logits, k, gate, renormalize, bias=bias, groups=groups, scale=2.5)
    scores = logits.sigmoid() if gate == "sigmoid" else logits.softmax(-1)
    for t, row in enumerate((scores + bias).tolist()):  # DeepSeek-V3, 2.1.2, row by row
        n, m = groups or (1, 1)
        members = [range(g * 8 // n, (g + 1) * 8 // n) for g in range(n)]
        best = sorted(members, key=lambda group: -sum(sorted((row[e] for e in group), reverse=True)[:2]))[:m]
        chosen = sorted((e for group in best for e in group), key=lambda e: -row[e])[:k]
        assert experts[t].tolist() == chosen
    expected = scores.gather(1, experts.long())
    expected = 2.5 * (expected / expected.sum(1, keepdim=True) if renormalize else expected)
    torch.testing.assert_close(weights, expected)
    cotangent = torch.randn_like(weights)
    grads = [torch.autograd.grad(w, logits, cotangent, retain_graph=True)[0] for w in (weights, expected)]
    torch.testing.assert_close(*grads)


def test_a_bias_of_zero_and_one_group_change_nothing() -> None:
    logits = torch.randn(9, 6)
    for gate in ("softmax", "sigmoid", "hard", "straight_through"):
        for k in (1, 3):
            expected = topk_route(logits, k, gate)
            for options in ({"bias": torch.zeros(6)}, {"groups": (1, 1)}, {"groups": (3, 3)}, {"scale": 1.0}):
                torch.testing.assert_close(topk_route(logits, k, gate, **options), expected)


def test_a_bias_chooses_no_masked_expert() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]])
    weights, experts = topk_route(logits, 2, "sigmoid", bias=torch.tensor([9.0, 0, 0, 9]))
    assert experts.tolist() == [[2, 1]]
    weights, experts = topk_route(logits, 2, "sigmoid", False, groups=(2, 1))
    assert experts.tolist() == [[2, 3]] and weights[0, 1] == 0


def test_errors_of_bias_and_groups() -> None:
    logits = torch.randn(3, 4)
    for groups in ((3, 1), (2, 3), (4, 1)):
        with pytest.raises(
            ValueError, match=r"groups must be \(n, m\) with n dividing E = 4, m <= n and k = 2 experts"
        ):
            topk_route(logits, 2, groups=groups)
    with pytest.raises(ValueError, match=r"bias must be \[E\], here \[4\], got shape \[3\]"):
        topk_route(logits, 2, bias=torch.zeros(3))
    logits[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"logits must be free of NaN .* row 1 has maximum nan"):
        topk_route(logits, 2, bias=torch.zeros(4))
