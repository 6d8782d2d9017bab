"""InOrder computes torch's sums and products, but rounds as a textbook loop does, on every CPU."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.testing import InOrder, Source

EPS = torch.finfo(torch.float32).eps


def results(dtype: torch.dtype) -> list[Tensor]:
    """The results of every operation that InOrder computes itself, including gradients."""
    s = Source(dtype)
    x, w, b = (s.randn(*shape).requires_grad_() for shape in ((3, 4, 7, 6), (5, 4, 3, 2), (5,)))
    a, c, v = (s.randn(*shape).requires_grad_() for shape in ((4, 6), (6, 5), (6,)))
    y = [
        *(F.conv2d(x, w, b, stride, padding) for stride, padding in ((1, 0), (2, 1), ((1, 2), (0, 1)))),
        *(x[:0].sum(), x.sum(), x.sum(1), x.sum((0, -1), keepdim=True), x.sum(2, dtype=torch.float64)),
        *(a @ c, a @ v, v @ v, x @ s.randn(3, 4, 6, 2), torch.addmm(v[:5], a, c, beta=0.5, alpha=2)),
        torch.baddbmm(x[0], x[1], s.randn(4, 6, 6), beta=0.5, alpha=2),
    ]
    return [t.detach() for t in (*y, *torch.autograd.grad(sum(t.double().sin().sum() for t in y), (x, w, b, a, c, v)))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_computes_what_torch_computes(dtype: torch.dtype) -> None:
    with InOrder():
        ours = results(dtype)
    for y, expected in zip(ours, results(dtype), strict=True):
        assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
        torch.testing.assert_close(y, expected, rtol=0, atol=20 * torch.finfo(dtype).eps * max(1, expected.abs().max()))


def test_rounds_term_by_term() -> None:
    """Half a unit in the last place is lost each time that it is added to 1, but not if the halves are added first."""
    halves = torch.tensor([1.0] + [EPS / 2] * 64)
    with InOrder():
        found = [halves.sum(), halves @ torch.ones(65), (halves[None] @ torch.ones(65, 1))[0, 0]]
        found.append(F.conv2d(halves.view(1, 65, 1, 1), torch.ones(1, 65, 1, 1))[0, 0, 0, 0])
    assert found == [1.0] * 4
    with InOrder():
        assert halves.flip(0).sum() == 1 + 32 * EPS


def test_other_convolutions_are_refused() -> None:
    x = torch.ones(1, 4, 5, 5)
    with InOrder(), pytest.raises(ValueError, match="in one group and not transposed"):
        F.conv2d(x, torch.ones(4, 1, 3, 3), groups=4)
    with InOrder(), pytest.raises(ValueError, match="in one group and not transposed"):
        F.conv_transpose2d(x, torch.ones(4, 2, 3, 3))
