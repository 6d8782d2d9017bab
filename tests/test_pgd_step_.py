"""pgd_step_: exact constraints, gradients that are zero or not finite, layouts, threads, messages."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_kernels import reference
from moe_kernels.ops import pgd_step_
from moe_kernels.testing import check_threads

NORMS = {"Linf": torch.inf, "L2": 2, "L1": 1}


def images(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.rand(shape, dtype=dtype)
    return (x + 0.1 * torch.randn_like(x)).clamp(0, 1), torch.randn_like(x), x


def length(delta: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), NORMS[norm], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 8 / 255), ("Linf", 1e-6), ("L2", 0.5), ("L1", 12.0)])
def test_result_stays_in_the_ball_and_in_the_bounds(norm: str, eps: float, dtype: torch.dtype) -> None:
    x_adv, grad, x = images(8, 3, 32, 32, dtype=dtype)
    radius = torch.full((8,), eps, dtype=dtype)
    for _ in range(5):
        pgd_step_(x_adv, grad, x, radius, eps / 4, norm, (0.05, 0.95))
        x_adv.clamp_(0.05, 0.95)
    inside = (x >= 0.05) & (x <= 0.95)
    delta = torch.where(inside, x_adv.double() - x.double(), 0)
    ulps = 0 if norm == "Linf" and dtype == torch.float32 else 4
    assert (length(delta, norm) <= radius.double() * (1 + ulps * torch.finfo(dtype).eps)).all()
    low, high = torch.tensor([0.05, 0.95], dtype=dtype)
    assert x_adv.min() >= low and x_adv.max() <= high


def test_closed_forms() -> None:
    x = torch.full((2, 2), 0.5, dtype=torch.float64)
    grad = torch.tensor([[3.0, -4.0], [0.0, 2.0]], dtype=torch.float64)

    def moved(norm: str, eps: float, alpha: float) -> list[list[float]]:
        return (pgd_step_(x.clone(), grad, x, eps, alpha, norm) - x).tolist()

    assert moved("Linf", 1.0, 0.25) == [[0.25, -0.25], [0.0, 0.25]]
    assert moved("Linf", 0.125, 0.25) == [[0.125, -0.125], [0.0, 0.125]]
    assert moved("L2", 1.0, 0.25) == [pytest.approx([0.15, -0.2]), [0.0, 0.25]]
    assert moved("L2", 0.125, 0.25) == [pytest.approx([0.075, -0.1]), [0.0, 0.125]]
    assert moved("L1", 1.0, 0.35) == [pytest.approx([0.15, -0.2]), pytest.approx([0.0, 0.35])]
    assert moved("L1", 0.25, 0.35) == [pytest.approx([0.1, -0.15]), pytest.approx([0.0, 0.25])]


@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_gradient_gives_no_step(norm: str) -> None:
    x_adv, grad, x = images(3, 40)
    expected = x_adv.clone()
    assert torch.equal(pgd_step_(x_adv, torch.zeros_like(grad), x, torch.inf, 0.5, norm), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_that_are_not_finite(norm: str) -> None:
    x_adv, grad, x = images(4, 40, dtype=torch.float64)
    grad[0, 3], grad[1, 5], grad[2] = torch.nan, torch.inf, torch.nan
    expected = reference.pgd_step_(x_adv.clone(), grad, x, 0.3, 0.2, norm)
    torch.testing.assert_close(pgd_step_(x_adv.clone(), grad, x, 0.3, 0.2, norm), expected)
    torch.testing.assert_close(
        pgd_step_(x_adv, grad.nan_to_num(nan=0.0, posinf=torch.inf), x, 0.3, 0.2, norm), expected
    )


def test_tiny_gradients_still_step() -> None:
    x = torch.full((1, 8), 0.5)
    moved = pgd_step_(x.clone(), torch.full_like(x, 1e-40), x, 1.0, 0.2, "L2") - x
    torch.testing.assert_close(moved, torch.full_like(x, 0.2 / 8**0.5))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [0.0, 1e-300, torch.inf])
def test_extreme_radii(norm: str, eps: float) -> None:
    x_adv, grad, x = images(3, 40, dtype=torch.float64)
    expected = reference.pgd_step_(x_adv.clone(), grad, x, eps, 0.2, norm)
    torch.testing.assert_close(pgd_step_(x_adv, grad, x, eps, 0.2, norm), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_layouts_agree(norm: str) -> None:
    x_adv, grad, x = images(4, 3, 6, 6)
    expected = pgd_step_(x_adv.clone(), grad, x, 0.2, 0.1, norm)
    last = torch.channels_last
    for layout in (
        lambda t: t.to(memory_format=last),
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: torch.stack([t, t], -1)[..., 0],
    ):
        for other in (layout, lambda t: t):
            result = pgd_step_(layout(x_adv.clone()), other(grad), other(x), 0.2, 0.1, norm)
            torch.testing.assert_close(result, expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_bitwise_equal_for_any_number_of_threads(norm: str) -> None:
    x_adv, grad, x = images(7, 3, 80, 80)
    check_threads(lambda: [pgd_step_(x_adv.clone(), grad, x, 0.2, 0.1, norm)])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (4, 1, 6, 6), (3, 50, 1000), (6, 9)])
def test_model_input_comes_with_the_same_step(norm: str, shape: tuple[int, ...]) -> None:
    x_adv, grad, x = images(*shape)
    mean, std = torch.rand(shape[1]), torch.rand(shape[1]) + 0.1
    by_channel = [t.view(-1, *[1] * (len(shape) - 2)) for t in (mean, std)]
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for layout in (torch.contiguous_format, torch.channels_last)[: 1 + (len(shape) == 4)]:
            alone, together = (x_adv.clone(memory_format=layout) for _ in range(2))
            pgd_step_(alone, grad.to(dtype), x, 0.2, 0.1, norm)
            model_input = pgd_step_(together, grad.to(dtype), x, 0.2, 0.1, norm, normalize=(mean, std))
            assert torch.equal(together, alone)
            assert torch.equal(model_input, ((alone - by_channel[0]) / by_channel[1]).to(dtype))
            assert model_input.dtype == dtype and model_input.is_contiguous(memory_format=layout)


def test_model_input_of_the_reference_is_outside_the_graph() -> None:
    x_adv, grad, x = images(3, 2, 4)
    mean, std = torch.rand(2, requires_grad=True), torch.rand(2) + 0.5
    ours, theirs = (
        pgd_step_(x_adv.clone(), grad, x, 0.2, 0.1, normalize=(mean, std), backend=b) for b in (None, "reference")
    )
    torch.testing.assert_close(ours, theirs)
    assert not ours.requires_grad and not theirs.requires_grad


@pytest.mark.parametrize("norm", NORMS)
def test_model_input_has_the_same_bits_for_any_number_of_threads(norm: str) -> None:
    x_adv, grad, x = images(7, 3, 80, 80)
    normalize = torch.rand(3), torch.rand(3) + 0.1
    check_threads(lambda: [pgd_step_(x_adv.clone(), grad, x, 0.2, 0.1, norm, normalize=normalize)])


def test_compiles_as_one_graph() -> None:
    x_adv, grad, x = images(3, 8)
    expected = pgd_step_(x_adv.clone(), grad, x, 0.2, 0.1)
    compiled = torch.compile(lambda *args: pgd_step_(*args, 0.2, 0.1), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x_adv, grad, x), expected)
    assert torch.equal(x_adv, expected)
    normalize = torch.rand(8), torch.rand(8) + 0.5
    expected = pgd_step_(x_adv.clone(), grad, x, 0.2, 0.1, normalize=normalize)
    compiled = torch.compile(
        lambda *args: pgd_step_(*args, 0.2, 0.1, normalize=normalize), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x_adv, grad, x), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_adv": torch.zeros(2, 3, dtype=torch.bfloat16)}, "x_adv must be float32 or float64 .*5.8 %"),
        ({"x_adv": torch.tensor(0.5)}, "x_adv must be"),
        ({"x_adv": torch.zeros(1, 3).expand(2, 3)}, r"x_adv must not be expanded, .* got strides \[0, 1\]"),
        ({"grad": torch.zeros(2, 4)}, r"grad must be .*\[2, 3\], got shape \[2, 4\]"),
        ({"grad": torch.zeros(2, 3, dtype=torch.int32)}, "grad must be a floating-point tensor"),
        ({"x": torch.zeros(2)}, r"x must be .*\[2, 3\], got shape \[2\]"),
        ({"x": torch.zeros(2, 3, dtype=torch.float64)}, "x must have the dtype of x_adv"),
        ({"x": torch.zeros(2, 3, device="meta")}, "x must be on the device of x_adv"),
        ({"eps": -0.1}, "eps must be at least 0, got -0.1"),
        ({"eps": float("nan")}, "eps must be at least 0, got nan"),
        ({"eps": torch.tensor([0.1, -0.1])}, "eps must be at least 0, got -0.1"),
        ({"alpha": torch.tensor([0.1, torch.nan])}, "alpha must be at least 0, got nan"),
        ({"alpha": torch.ones(3)}, r"alpha must be a float or \[B\]"),
        ({"alpha": torch.ones(2, dtype=torch.int64)}, "alpha must be a floating-point tensor"),
        ({"norm": "L3"}, "norm must be one of Linf, L2, L1, got 'L3'"),
        ({"bounds": (1.0, 0.0)}, "bounds must be"),
        ({"normalize": (torch.zeros(2), torch.ones(3))}, r"mean must be \[C\].*\[3\], got shape \[2\]"),
        ({"normalize": (torch.zeros(3), torch.ones(1, 3))}, r"std must be \[C\].*\[3\], got shape \[1, 3\]"),
        ({"normalize": (torch.zeros(3, dtype=torch.int32), torch.ones(3))}, "mean must be a floating-point tensor"),
        ({"normalize": (torch.zeros(3), torch.ones(3, device="meta"))}, "std must be on the device of x_adv"),
        ({"normalize": (torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))}, "std must be greater than 0, got 0"),
        ({"backend": "magic"}, "backend must be None"),
    ],
)
def test_mistakes(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"x_adv": torch.zeros(2, 3), "grad": torch.ones(2, 3), "x": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=message):
        pgd_step_(**(good | {"eps": 0.1, "alpha": 0.1} | change))


def test_overwriting_what_a_backward_needs_is_an_error() -> None:
    x_adv, weight = torch.rand(2, 3), torch.rand(2, 3, requires_grad=True)
    y = (x_adv * weight).sum()
    pgd_step_(x_adv, torch.ones(2, 3), torch.zeros(2, 3), 0.1, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        x_adv = torch.zeros(2, 3)
        assert (pgd_step_(x_adv, torch.ones(2, 3), torch.zeros(2, 3), 0.1, 0.1) > 0).all()


def test_one_value_per_sample_has_no_channels() -> None:
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=r"x_adv must be \[B, C, ...\] where normalize is given, got shape \[2\]"):
        pgd_step_(x.clone(), x, x, 0.1, 0.1, normalize=(x, x + 1))


def test_x_adv_must_not_require_grad() -> None:
    x_adv = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="x_adv must not require grad"):
        pgd_step_(x_adv, torch.ones(2, 3), torch.zeros(2, 3), 0.1, 0.1)
    with torch.no_grad():
        assert pgd_step_(x_adv, torch.ones(2, 3), torch.zeros(2, 3), 0.1, 0.1) is x_adv
