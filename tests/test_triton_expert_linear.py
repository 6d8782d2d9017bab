"""Triton kernels of the grouped linear layer and the expert MLP, under Triton's interpreter where there is no GPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels import reference, testing
from moe_kernels.testing import Source, assert_equals
from moe_kernels.triton_kernels.activations import ACTIVATIONS, GATED
from moe_kernels.triton_kernels.configs import Tile
from moe_kernels.triton_kernels.expert_linear import expert_linear
from moe_kernels.triton_kernels.expert_linear_weight_grad import expert_linear_weight_grad
from moe_kernels.triton_kernels.expert_mlp import expert_mlp_hidden_grad
from moe_kernels.triton_kernels.launch import descriptor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF_AND_SINGLE = [torch.float32, torch.bfloat16, torch.float16]
LARGE = Tile(128, 128, 64, 4, 2)  # few programs: the interpreter runs one after the other
TILES = {"pointers": Tile(32, 64, 32, 4, 2), "tma": Tile(32, 64, 32, 4, 2, tma=True)}
COUNTS = (40, 0, 33)

by_dtype = pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=lambda d: str(d).removeprefix("torch."))
by_tile = pytest.mark.parametrize("tile", TILES.values(), ids=TILES)


def check(kernel: Callable[..., Any], meaning: Callable[..., Any], args: tuple[Any, ...], dtype: torch.dtype) -> None:
    assert_equals(kernel(*args), meaning, args, dtype)


@by_dtype
@pytest.mark.parametrize("case", testing.cases("expert_linear"), ids=str)
def test_forward_and_gradients_on_all_cases(case: testing.Case, dtype: torch.dtype) -> None:
    x, weight, _, offsets, rows = args = case.arguments(dtype, DEVICE)
    check(partial(expert_linear, tile=LARGE), reference.expert_linear, args, dtype)
    num_rows = (x if rows is None else rows).shape[0]
    grad = Source(dtype, DEVICE, seed=1).randn(num_rows, weight.shape[1])
    back, weight_grad = (grad, weight.transpose(1, 2), None, offsets), (grad, x, offsets, rows)
    check(partial(expert_linear, tile=LARGE), reference.expert_linear, back, dtype)
    check(partial(expert_linear_weight_grad, tile=LARGE), reference.expert_linear_weight_grad, weight_grad, dtype)


def aligned_arguments(dtype: torch.dtype, gather: bool, k: int = 64, n: int = 48) -> tuple[Any, ...]:
    """Widths that TMA descriptors can address."""
    s = Source(dtype, DEVICE)
    rows = s.randint(50, sum(COUNTS)) if gather else None
    x = s.randn(50 if gather else sum(COUNTS), k)
    return x, s.randn(3, n, k).div(k**0.5), s.randn(3, n), s.offsets(COUNTS), rows


@by_dtype
@pytest.mark.parametrize("gather", [False, True], ids=["sorted", "gather"])
def test_tma_descriptors(dtype: torch.dtype, gather: bool) -> None:
    tile = TILES["tma"]
    x, weight, _, offsets, rows = args = aligned_arguments(dtype, gather)
    check(partial(expert_linear, tile=tile), reference.expert_linear, args, dtype)
    grad = Source(dtype, DEVICE, seed=1).randn(int(offsets[-1]), weight.shape[1])
    back, weight_grad = (grad, weight.transpose(1, 2), None, offsets), (grad, x, offsets, rows)
    check(partial(expert_linear, tile=tile), reference.expert_linear, back, dtype)
    check(partial(expert_linear_weight_grad, tile=tile), reference.expert_linear_weight_grad, weight_grad, dtype)


@pytest.mark.parametrize("expanded", [(0,), (0, 1), (1,)], ids=["rows", "rows and columns", "columns"])
def test_an_expanded_axis_has_no_descriptor(expanded: tuple[int, ...]) -> None:
    """The gradient of a sum has strides of 0, which TMA does not take."""
    x, _, _, offsets, _ = aligned_arguments(torch.float16, gather=False)
    grad = Source(torch.float16, DEVICE, seed=1).randn(1 if 0 in expanded else len(x), 1 if 1 in expanded else 48)
    grad = grad.expand(len(x), 48)
    assert descriptor(grad, [16, 16]) is None and descriptor(grad.contiguous(), [16, 16]) is not None
    args, meaning = (grad, x, offsets), reference.expert_linear_weight_grad
    check(partial(expert_linear_weight_grad, tile=TILES["tma"]), meaning, args, torch.float16)


@by_tile
def test_rows_of_other_experts_do_not_leak(tile: Tile) -> None:
    """A row of NaN affects only its own result and its own expert's weight gradient."""
    x, weight, _, offsets, _ = aligned_arguments(torch.float32, gather=False)
    x[40] = float("nan")  # the first row of the last expert
    y = expert_linear(x, weight, None, offsets, tile=tile)
    assert y[40].isnan().all() and not y[:40].isnan().any() and not y[41:].isnan().any()
    dweight = expert_linear_weight_grad(y.new_ones(x.shape[0], 48), x, offsets, tile=tile)
    assert dweight[2].isnan().all() and not dweight[0].isnan().any()
    assert (dweight[1] == 0).all()


def test_weight_grad_into_a_transposed_view() -> None:
    x, weight, _, offsets, rows = aligned_arguments(torch.float32, gather=True)
    grad = Source(torch.float32, DEVICE, seed=1).randn(int(offsets[-1]), weight.shape[1])
    out = torch.empty(3, x.shape[1], weight.shape[1], device=DEVICE)
    expert_linear_weight_grad(grad, x, offsets, rows, out=out.transpose(1, 2))
    assert torch.equal(out, expert_linear_weight_grad(grad, x, offsets, rows).transpose(1, 2))


def act(z: Tensor, name: str) -> Tensor:
    if name in GATED:
        first, second = z.chunk(2, dim=1)
        return act(first, GATED[name]) * second
    return F.relu(z).square() if name == "relu2" else getattr(F, name)(z)


@by_tile
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_epilogue(activation: str, dtype: torch.dtype, tile: Tile) -> None:
    """The activation equals that of the stored pre-activation; z is what the plain layer gives."""
    args = aligned_arguments(dtype, gather=True, k=32, n=96)
    z = torch.empty(int(args[3][-1]), 96, dtype=dtype, device=DEVICE)
    a = expert_linear(*args, activation=activation, z=z, tile=tile)
    assert_equals(z, reference.expert_linear, args, dtype)
    assert_equals(a, act, (z, activation), dtype)
    if activation in ("relu", "swiglu"):
        assert torch.equal(a, expert_linear(*args, activation=activation, tile=tile))


@by_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hidden_grad(activation: str, dtype: torch.dtype) -> None:
    s = Source(dtype, DEVICE)
    da, z = s.randn(37, 50), s.randn(37, 100 if activation in GATED else 50)
    args = da, z, s.rand(37, dtype=torch.float32), activation
    kernel = partial(expert_mlp_hidden_grad, block=(16, 32))
    check(kernel, reference.expert_mlp_hidden_grad, (*args, True, True, True), dtype)
    for i in range(3):
        alone = kernel(*args, *(j == i for j in range(3)))
        assert [r.numel() > 0 for r in alone] == [j == i for j in range(3)]
        assert torch.equal(alone[i], kernel(*args)[i])
