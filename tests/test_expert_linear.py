"""expert_linear beyond the common contract: threads, saved bytes, compilation, autocast, bad input."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels import reference
from moe_kernels.ops import expert_linear
from moe_kernels.testing import Source, check_threads


def arguments(counts: tuple[int, ...] = (4, 0, 5), k: int = 6, n: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = Source(torch.float32)
    return s.randn(sum(counts), k), s.randn(len(counts), n, k), s.randn(len(counts), n), s.offsets(counts)


def test_equals_a_loop_of_linear_layers() -> None:
    x, weight, bias, offsets = arguments()
    expected = torch.cat([F.linear(x[:4], weight[0], bias[0]), F.linear(x[4:], weight[2], bias[2])])
    torch.testing.assert_close(expert_linear(x, weight, bias, offsets), expected)


def test_bitwise_equal_for_any_number_of_threads() -> None:
    x, weight, bias, offsets = arguments((300, 1, 0, 200), 129, 300)
    grad = torch.randn(501, 300)

    def results() -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = expert_linear(*leaves, offsets)
        return y, *torch.autograd.grad(y, leaves, grad)

    check_threads(results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_reach_only_their_own_results(dtype: torch.dtype) -> None:
    x, weight, bias, offsets = (t.to(dtype) if t.is_floating_point() else t for t in arguments((9, 0, 7), 530, 21))
    x[2, 529], x[8, 3], weight[2, 20, 8] = float("nan"), float("inf"), float("-inf")
    y = expert_linear(x, weight, bias, offsets)
    expected = reference.expert_linear(x, weight, bias, offsets)
    finite = expected.isfinite()
    assert finite.sum() == (16 - 2) * 21 - 7
    assert torch.equal(y.isfinite(), finite)
    torch.testing.assert_close(y[~finite], expected[~finite], equal_nan=True)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_saves_only_what_the_backward_needs(frozen: str) -> None:
    x, weight, _, offsets = arguments()
    x.requires_grad_(frozen != "x")
    weight.requires_grad_(frozen != "weight")
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        expert_linear(x, weight, None, offsets)
    kept = {t.data_ptr() for t in saved}
    assert (x.data_ptr() in kept) == (frozen != "weight")
    assert (weight.data_ptr() in kept) == (frozen != "x")


@torch.no_grad()
def test_compiles_where_nothing_is_recorded() -> None:
    x, weight, bias, offsets = arguments()
    weight.requires_grad_()
    eager = expert_linear(x, weight, bias, offsets)
    assert not eager.requires_grad
    torch.testing.assert_close(torch.compile(expert_linear, fullgraph=True)(x, weight, bias, offsets), eager)


def test_compiles_without_a_graph_break() -> None:
    x, weight, bias, offsets = arguments()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    compiled = torch.compile(expert_linear, fullgraph=True)(*leaves, offsets)
    eager = expert_linear(*leaves, offsets)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(
        torch.autograd.grad(compiled.square().sum(), leaves), torch.autograd.grad(eager.square().sum(), leaves)
    )


def test_autocast_computes_in_bf16_and_returns_fp32_gradients() -> None:
    x, weight, bias, offsets = arguments()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = expert_linear(x, weight, bias, offsets)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_autocast_does_not_mix_float64_with_others() -> None:
    x, weight, _, offsets = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        assert expert_linear(x.double(), weight.double(), None, offsets).dtype == torch.float64
        with pytest.raises(ValueError, match=r"weight must have the dtype of x, torch.float32, got torch.float64"):
            expert_linear(x, weight.double(), None, offsets)


def test_reference_backend_is_the_reference() -> None:
    args = arguments()
    torch.testing.assert_close(expert_linear(*args, backend="reference"), expert_linear(*args))


def test_bad_input_names_the_argument() -> None:
    x, weight, bias, offsets = arguments()
    rows = torch.zeros(9, dtype=torch.int32)
    for args, message in [
        ((x[0], weight, bias, offsets), r"x must have 2 dimensions, got shape \[6\]"),
        ((x, weight[0], bias, offsets), r"weight must have 3 dimensions"),
        ((x[:, :5], weight, bias, offsets), r"weight must be \[E, out, in\].*'\*', '\*', 5\], got shape \[3, 3, 6\]"),
        ((x, weight.double(), bias, offsets), "weight must have the dtype of x, torch.float32, got torch.float64"),
        ((x, weight, bias[:, :2], offsets), r"bias must be \[E, out\], here \[3, 3\], got shape \[3, 2\]"),
        ((x.int(), weight, bias, offsets), "x must be a floating-point tensor, got torch.int32"),
        ((x, weight, bias, offsets[:-1]), r"offsets must be int32 of shape \[4\]"),
        ((x, weight, bias, offsets.long()), "offsets must be int32"),
        ((x, weight, bias, offsets - 1), "offsets must run from 0 to the number of rows 9, got -1 to 8"),
        ((x, weight, bias, torch.tensor([0, 5, 4, 9]).int()), "offsets must not decrease, got 5 then 4 at expert 1"),
        ((x, weight, bias, offsets, rows.long()), "rows must be an int32 tensor"),
        ((x.to("meta"), weight, bias, offsets), "weight must be on the device of x, meta, got cpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            expert_linear(*args)
    with pytest.raises(ValueError, match="backend must be None or \"reference\", got 'fast'"):
        expert_linear(x, weight, bias, offsets, backend="fast")
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 9\), got 9"):
        expert_linear(x, weight, bias, offsets, rows + 9)
