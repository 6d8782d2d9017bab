"""mask_relu beyond the common contract: saved bytes, NaN, gradients in another layout, in place, bad input."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.ops import mask_relu, mask_relu_forward, mask_relu_forward_
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


RECTIFIERS = {
    "relu": ((), F.relu),
    "relu6": ((0.0, 6.0), F.relu6),
    "hardtanh": ((-0.5, 1.0), lambda x: F.hardtanh(x, -0.5, 1.0)),
    "leaky": ((0.0, None, 0.25), lambda x: F.leaky_relu(x, 0.25)),
    "leaky_without_slope": ((0.0, None, 0.0), lambda x: F.leaky_relu(x, 0.0)),
}


@pytest.mark.parametrize("name", RECTIFIERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_other_bounds_and_slopes_are_torchs(name: str, dtype: torch.dtype) -> None:
    """Also where threads share the work, and where the last block and its last byte are not full."""
    rectifier, function = RECTIFIERS[name]
    special = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 6.0, -0.5, 1.0, 0.1, -1e-30]
    x = torch.cat([torch.tensor(special), 4 * torch.randn(70_001)]).to(dtype).requires_grad_()
    grad = torch.randn(x.shape).to(dtype)
    grad[20:23] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    expected = function(x)
    (dexpected,) = torch.autograd.grad(expected, x, grad)
    y, bits = mask_relu_forward(x, *rectifier)
    (dx,) = torch.autograd.grad(y, x, grad)
    written = x.detach().clone()
    assert torch.equal(mask_relu_forward_(written, *rectifier), bits)
    if name in ("relu6", "hardtanh"):  # torch's vector loop lets no gradient of a NaN pass, its scalar loop does
        assert dx[0] == grad[0]
        dexpected[0] = grad[0]
    for got, wanted in ((y, expected), (dx, dexpected), (written, expected)):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def test_in_place_a_tensor_with_gaps_is_refused() -> None:
    x = torch.randn(4, 6)[:, ::2]
    before = x.clone()
    with pytest.raises(ValueError, match="x must be contiguous or channels-last, as it is overwritten"):
        mask_relu_forward_(x)
    assert torch.equal(x, before)


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(ValueError, match=r"x must be a floating-point tensor, got torch.int64"):
        mask_relu(torch.arange(3))
    with pytest.raises(ValueError, match='backend must be None or "reference"'):
        mask_relu(torch.randn(3, requires_grad=True), backend="fast")
