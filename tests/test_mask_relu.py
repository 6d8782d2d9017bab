"""mask_relu beyond the common contract: saved bytes, NaN, gradients in another layout, bad input."""

import pytest
import torch
from torch import Tensor

from moe_kernels.ops import mask_relu
from moe_kernels.testing import Source


@pytest.mark.parametrize("numel", [0, 1, 8, 1001])
def test_saves_one_bit_per_element(numel: int) -> None:
    x = torch.randn(numel, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mask_relu(x)
    assert sum(t.untyped_storage().nbytes() for t in saved) == (numel + 7) // 8


def test_treats_special_values_as_torch_does() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 2.0, -2.0], requires_grad=True)
    grad = torch.tensor([1.0, 2.0, float("nan"), 3.0, 4.0, 5.0, float("inf"), float("nan"), 6.0])
    y, expected = mask_relu(x), torch.relu(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    (dx,), (dexpected,) = torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(dx, dexpected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("of_x", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_grad", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_may_come_in_another_layout(of_x: torch.memory_format, of_grad: torch.memory_format) -> None:
    s = Source(torch.float32)
    x = s.randn(3, 5, 4, 7).contiguous(memory_format=of_x).requires_grad_()
    grad = s.randn(3, 5, 4, 7).contiguous(memory_format=of_grad)
    y = mask_relu(x)
    assert y.stride() == x.stride()
    (dx,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(dx, grad * (x > 0))
    (expanded,) = torch.autograd.grad(mask_relu(x).sum(), x)
    assert torch.equal(expanded, (x > 0).float())


def test_compiles_without_a_graph_break() -> None:
    x = torch.randn(5, 7, requires_grad=True)
    y = torch.compile(mask_relu, fullgraph=True)(x)
    assert torch.equal(y, torch.relu(x))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], (x > 0).float())


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(ValueError, match="x must be a floating-point tensor, got torch.int64"):
        mask_relu(torch.arange(3))
    with pytest.raises(ValueError, match='backend must be None or "reference"'):
        mask_relu(torch.randn(3, requires_grad=True), backend="fast")
