"""combine beyond the common contract: closed form, mixed dtypes, what it saves, threads, errors."""

import pytest
import torch

from moe_kernels.ops import combine, group_by_expert
from moe_kernels.ops.combine import gather_rows
from moe_kernels.testing import check_threads

POSITION = torch.tensor([[0, 2], [3, 1]], dtype=torch.int32)


def test_closed_form() -> None:
    y, weights = torch.tensor([[1.0], [10], [100], [1000]]), torch.tensor([[2.0, 3], [4, 5]])
    assert combine(y, weights, POSITION).tolist() == [[302.0], [4050.0]]


@pytest.mark.parametrize("y_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_gradient_has_the_dtype_of_its_tensor(y_dtype: torch.dtype, weights_dtype: torch.dtype) -> None:
    y = torch.randn(4, 3, dtype=y_dtype, requires_grad=True)
    weights = torch.rand(2, 2, dtype=weights_dtype, requires_grad=True)
    out = combine(y, weights, POSITION)
    assert out.dtype == y_dtype
    torch.testing.assert_close(out, combine(y, weights, POSITION, backend="reference"))
    dy, dweights = torch.autograd.grad(out.sum(), (y, weights), create_graph=True)
    assert (dy.dtype, dweights.dtype) == (y_dtype, weights_dtype)
    torch.autograd.grad(dy.sum() + dweights.sum(), (y, weights))


@pytest.mark.parametrize(("y_needs", "weights_needs"), [(True, True), (True, False), (False, True)])
def test_saves_only_what_the_gradients_need(y_needs: bool, weights_needs: bool) -> None:
    saved: list[int] = []
    y, weights = torch.randn(4, 3, requires_grad=y_needs), torch.rand(2, 2, requires_grad=weights_needs)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        combine(y, weights, POSITION)
    expected = [*[y.data_ptr()] * weights_needs, *[weights.data_ptr()] * y_needs, POSITION.data_ptr()]
    assert saved == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_equal_for_any_number_of_threads(dtype: torch.dtype) -> None:
    position = group_by_expert(torch.randint(5, (301, 3)), 5).position
    y = torch.randn(903, 301, requires_grad=True, dtype=dtype)
    weights = torch.rand(301, 3, requires_grad=True)

    def run() -> tuple[torch.Tensor, ...]:
        out = combine(y, weights, position)
        return out, *torch.autograd.grad(out.square().sum(), (y, weights))

    check_threads(run)


@pytest.mark.parametrize(
    ("y", "weights", "position", "message"),
    [
        (torch.zeros(5, 3), torch.zeros(2, 2), POSITION, r"y must be \[T \* k, ...\] .* \[4, 3\], got shape \[5, 3\]"),
        (torch.zeros(()), torch.zeros(2, 2), POSITION, r"y must be \[T \* k, ...\] .* got shape \[\]"),
        (torch.zeros(4, 3).int(), torch.zeros(2, 2), POSITION, "y must be a floating-point tensor"),
        (torch.zeros(4, 3), torch.zeros(2, 2).int(), POSITION, "weights must be a floating-point tensor"),
        (torch.zeros(4, 3), torch.zeros(4), POSITION, "weights must have 2 dimensions"),
        (torch.zeros(4, 3), torch.zeros(1, 4), POSITION, r"position must be \[T, k\] like weights"),
        (torch.zeros(4, 3), torch.zeros(2, 2), POSITION.long(), "position must be an int32 tensor"),
        (torch.zeros(4, 3), torch.zeros(2, 2), POSITION + 1, "position must hold each of 0 to 3 once, got 4 at slot 2"),
        (
            torch.zeros(4, 3),
            torch.zeros(2, 2),
            POSITION // 2,
            "position must hold each of 0 to 3 once, got 1 at slot 2",
        ),
    ],
)
def test_errors_name_the_argument(y: torch.Tensor, weights: torch.Tensor, position: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine(y, weights, position)


def test_rows_are_gathered_with_a_gradient() -> None:
    groups = group_by_expert(torch.randint(5, (7, 3)), 5)
    x, rows = torch.randn(7, 2, dtype=torch.float64, requires_grad=True), groups.order // 3
    assert torch.equal(gather_rows(x, rows, groups.position), x[rows.long()])

    def squares(x: torch.Tensor) -> torch.Tensor:
        return gather_rows(x, rows, groups.position).square()

    assert torch.autograd.gradcheck(squares, x) and torch.autograd.gradgradcheck(squares, x)
    tangents = torch.func.jvp(squares, (x.detach(),), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangents, 2 * x.detach()[rows.long()])
