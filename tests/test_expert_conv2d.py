"""expert_conv2d beyond the common contract: layout, saved tensors, compilation, autocast, bad input; tested for
winograd_conv2d, too, where both agree."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from moe_kernels import backends
from moe_kernels._layout import channels_innermost
from moe_kernels.ops import expert_conv2d, winograd_conv2d
from moe_kernels.testing import Source, check_threads

BOTH = pytest.mark.parametrize("convolve", [expert_conv2d, winograd_conv2d])


def arguments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = Source(torch.float32)
    return s.randn(5, 3, 6, 7), s.randn(3, 4, 3, 3, 3), s.randn(3, 4), s.offsets((2, 0, 3))


def test_equals_a_loop_of_convolutions() -> None:
    x, weight, bias, offsets = arguments()
    parts = [F.conv2d(x[:2], weight[0], bias[0], 2, 1), F.conv2d(x[2:], weight[2], bias[2], 2, 1)]
    torch.testing.assert_close(expert_conv2d(x, weight, bias, offsets, 2, 1), torch.cat(parts))


@BOTH
def test_channels_last_stays_channels_last(convolve: Callable[..., Tensor]) -> None:
    x, weight, bias, offsets = arguments()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = convolve(x, weight, bias, offsets, padding=1)
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert dx.is_contiguous(memory_format=torch.channels_last) and not dx.is_contiguous()
    torch.testing.assert_close(y, convolve(x.contiguous(), weight, bias, offsets, padding=1))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("padding", [0, 1, (3, 0)])
@pytest.mark.parametrize("stride", [1, 2, (3, 2)])
def test_the_weight_gradient_of_pointwise_kernels(stride: Any, padding: Any, channels_last: bool) -> None:
    """Also where some output pixels, or all of a row, lie in the padding."""
    s = Source(torch.float32)
    x, weight, offsets = s.randn(5, 3, 6, 1), s.randn(3, 4, 3, 1, 1).requires_grad_(), s.offsets((2, 0, 3))
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    y = expert_conv2d(x, weight, None, offsets, stride, padding)
    grad = s.randn(*y.shape).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    parts = [F.conv2d(x[:2], weight[0], None, stride, padding), F.conv2d(x[2:], weight[2], None, stride, padding)]
    with torch.autocast("cpu", torch.bfloat16):  # which does not change the type of a gradient's products
        torch.testing.assert_close(*(torch.autograd.grad(out, weight, grad)[0] for out in (y, torch.cat(parts))))


@BOTH
def test_an_expert_without_rows_gets_a_zero_gradient(convolve: Callable[..., Tensor]) -> None:
    x, weight, bias, offsets = arguments()
    weight.requires_grad_()
    bias.requires_grad_()
    convolve(x, weight, bias, offsets).sum().backward()
    assert weight.grad is not None and bias.grad is not None
    assert not weight.grad[1].any() and not bias.grad[1].any()
    assert weight.grad[0].any() and bias.grad[2].any()


@BOTH
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_saves_only_what_the_backward_needs(frozen: str, convolve: Callable[..., Tensor]) -> None:
    x, weight, _, offsets = arguments()
    x.requires_grad_(frozen != "x")
    weight.requires_grad_(frozen != "weight")
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        convolve(x, weight, None, offsets)
    kept = {t.data_ptr() for t in saved}
    assert (x.data_ptr() in kept) == (frozen != "weight")
    assert (weight.data_ptr() in kept) == (frozen != "x")


def test_compiles_without_a_graph_break() -> None:
    x, weight, bias, offsets = arguments()
    leaves = [t.requires_grad_() for t in (x.contiguous(memory_format=torch.channels_last), weight, bias)]
    compiled = torch.compile(expert_conv2d, fullgraph=True)(*leaves, offsets, 2, (1, 0))
    eager = expert_conv2d(*leaves, offsets, 2, (1, 0))
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(
        torch.autograd.grad(compiled.square().sum(), leaves), torch.autograd.grad(eager.square().sum(), leaves)
    )


@BOTH
def test_autocast_computes_in_bf16_and_returns_fp32_gradients(convolve: Callable[..., Tensor]) -> None:
    x, weight, bias, offsets = arguments()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = convolve(x, weight, bias, offsets)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_bad_input_names_the_argument() -> None:
    x, weight, bias, offsets = arguments()
    for match, args in {
        r"x must have 4 dimensions, got shape \[3, 6, 7\]": (x[0], weight, bias, offsets),
        r"weight must have 5 dimensions": (x, weight[0], bias, offsets),
        r"weight must be \[E, O, C, kh, kw\] with C = x.shape\[1\], here \['\*', '\*', 2": (
            x[:, :2],
            weight,
            bias,
            offsets,
        ),
        r"weight must have the dtype of x, torch.float32, got torch.float64": (x, weight.double(), bias, offsets),
        r"weight must have at least one .* got shape \[3, 0, 3, 3, 3\]": (x, weight[:, :0], None, offsets),
        r"bias must be \[E, O\], here \[3, 4\], got shape \[3, 3\]": (x, weight, bias[:, :3], offsets),
        r"weight must have kernels .* got shape \[3, 4, 3, 3, 3\]": (x[:, :, :2], weight, bias, offsets),
        r"stride must be one or two integers >= 1, got 0": (x, weight, bias, offsets, 0),
        r"stride must be one or two integers >= 1, got \(1, 2, 3\)": (x, weight, bias, offsets, (1, 2, 3)),
        r"padding must be one or two integers >= 0, got -1": (x, weight, bias, offsets, 1, -1),
        r"offsets must be int32 of shape \[4\]": (x, weight, bias, offsets[:3]),
        r"offsets must run from 0 to the number of rows 4, got 0 to 5": (x[:4], weight, bias, offsets),
    }.items():
        with pytest.raises(ValueError, match=match):
            expert_conv2d(*args)


def test_bitwise_equal_for_any_number_of_threads() -> None:
    s = Source(torch.float32)
    x, weight, offsets = s.randn(90, 5, 9, 8), s.randn(3, 6, 5, 3, 3), s.offsets((70, 1, 19))
    grad = s.randn(90, 6, 9, 8)

    def results() -> tuple[torch.Tensor, ...]:
        leaf = x.clone().requires_grad_()
        y = expert_conv2d(leaf, weight, None, offsets, padding=1)
        return y, *torch.autograd.grad(y, [leaf], grad)

    check_threads(results)


def test_autocast_on_a_gpu_casts_the_weight_into_the_layout_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does so once for the forward and the backward; tested without a GPU, and so without data."""
    seen: list[tuple[Tensor, ...]] = []
    monkeypatch.setattr(backends, "choose", lambda op, backend, x: lambda *args: seen.append(args))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    with FakeTensorMode(), torch.no_grad():
        x, weight = torch.empty(4, 8, 5, 5, device="cuda"), torch.empty(2, 16, 8, 3, 3, device="cuda")
        expert_conv2d(x, weight, None, torch.empty(3, dtype=torch.int32, device="cuda"), 1, 1)
    ((images, kernels, *_),) = seen
    assert images.dtype == kernels.dtype == torch.bfloat16
    assert kernels.shape == weight.shape and kernels.stride() == (16 * 72, 72, 1, 24, 8)


def test_channels_innermost() -> None:
    weight = torch.randn(2, 3, 4, 3, 3, requires_grad=True)
    out = channels_innermost(weight, torch.float64)
    assert torch.equal(out, weight.double()) and out.stride(2) == 1
    assert channels_innermost(out) is out and channels_innermost(weight[:, :, :1]).data_ptr() == weight.data_ptr()
    (grad,) = torch.autograd.grad(out, weight, torch.arange(out.numel()).view(out.shape).double())
    assert torch.equal(grad.flatten(), torch.arange(out.numel()).float())
