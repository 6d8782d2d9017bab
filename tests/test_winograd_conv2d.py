"""winograd_conv2d beyond the common contract: accuracy, layout, saved tensors, higher derivatives, bad input."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.nn import ExpertConv2d
from moe_kernels.ops import expert_conv2d, winograd_conv2d
from moe_kernels.testing import Source, check_threads


def arguments(channels: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = Source(torch.float32)
    return s.randn(5, channels, 6, 7), s.randn(3, 4, channels, 3, 3), s.randn(3, 4), s.offsets((2, 0, 3))


def test_rounds_at_most_three_times_as_much_as_a_direct_convolution() -> None:
    s = Source(torch.float32)
    x, weight, offsets = s.randn(2, 128, 16, 16), s.randn(1, 128, 128, 3, 3), s.offsets((2,))
    exact = F.conv2d(x.double(), weight[0].double(), None, 1, 1)
    error, usual = (
        (y - exact).square().mean()
        for y in (winograd_conv2d(x, weight, None, offsets, 1), F.conv2d(x, weight[0], None, 1, 1))
    )
    assert error < 9 * usual


def test_is_a_loop_of_convolutions() -> None:
    x, weight, bias, offsets = arguments()
    parts = [F.conv2d(x[:2], weight[0], bias[0], 1, (0, 2)), F.conv2d(x[2:], weight[2], bias[2], 1, (0, 2))]
    torch.testing.assert_close(
        winograd_conv2d(x, weight, bias, offsets, (0, 2)), torch.cat(parts), rtol=1e-4, atol=1e-4
    )


def test_channels_last_stays_channels_last() -> None:
    x, weight, bias, offsets = arguments()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = winograd_conv2d(x, weight, bias, offsets, 1)
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert dx.is_contiguous(memory_format=torch.channels_last) and not dx.is_contiguous()
    assert torch.equal(y, winograd_conv2d(x.contiguous(), weight, bias, offsets, 1))


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_saves_only_what_the_backward_needs(frozen: str) -> None:
    x, weight, _, offsets = arguments()
    x.requires_grad_(frozen != "x")
    weight.requires_grad_(frozen != "weight")
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        winograd_conv2d(x, weight, None, offsets, 1)
    kept = {t.data_ptr() for t in saved}
    assert (x.data_ptr() in kept) == (frozen != "weight")
    assert (weight.data_ptr() in kept) == (frozen != "x")


def test_second_derivatives_are_those_of_expert_conv2d() -> None:
    x, weight, bias, offsets = arguments()

    def derivatives(op: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = op(*leaves, offsets, padding=1)
        first = torch.autograd.grad(y.tanh().sum(), leaves, create_graph=True)
        return (*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    for ours, expected in zip(derivatives(winograd_conv2d), derivatives(expert_conv2d), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_what_is_no_number_stays_in_its_tiles() -> None:
    x, weight, offsets = torch.ones(1, 1, 12, 12), torch.ones(1, 1, 1, 3, 3), Source(torch.float32).offsets((1,))
    x[0, 0, 5, 5] = torch.nan
    wrong = winograd_conv2d(x, weight, None, offsets, 1)[0, 0].isnan()
    expected = torch.zeros_like(wrong)
    expected[4:8, 4:8] = True
    assert torch.equal(wrong, expected)


def test_autocast_computes_in_bf16_and_returns_fp32_gradients() -> None:
    x, weight, bias, offsets = arguments()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = winograd_conv2d(x, weight, bias, offsets)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_a_layer_takes_it_where_it_saves_work() -> None:
    x, _, _, offsets = arguments(16)
    for saves, layer in {
        True: ExpertConv2d(3, 16, 16, 3, padding=1),
        False: ExpertConv2d(3, 16, 16, 3, stride=2, padding=1),
    }.items():
        direct = expert_conv2d(x, layer.weight, layer.bias, offsets, layer.stride, layer.padding)
        y = layer(x, offsets)
        assert torch.equal(y, winograd_conv2d(x, layer.weight, layer.bias, offsets, 1) if saves else direct)
        assert torch.equal(y, direct) != saves
        layer.double()(x.double(), offsets)


def test_bad_input_names_the_argument() -> None:
    x, weight, bias, offsets = arguments()
    double = [t.double() for t in (x, weight, bias)]
    for match, args in {
        r"x must have 4 dimensions, got shape \[3, 6, 7\]": (x[0], weight, bias, offsets),
        r"weight must be \[E, O, C, 3, 3\] with C = x.shape\[1\]": (x, weight[..., :2], bias, offsets),
        r"weight must have the dtype of x, torch.float32, got torch.float64": (x, weight.double(), bias, offsets),
        r"bias must be \[E, O\], here \[3, 4\], got shape \[3, 3\]": (x, weight, bias[:, :3], offsets),
        r"padding must be at most 2 .* got \[3, 1\]": (x, weight, bias, offsets, (3, 1)),
        r"padding must .* make x \[5, 3, 2, 7\] at least 3 pixels": (x[:, :, :2], weight, bias, offsets),
        r"padding must be one or two integers >= 0, got -1": (x, weight, bias, offsets, -1),
        r"offsets must be int32 of shape \[4\]": (x, weight, bias, offsets[:3]),
        r"offsets must run from 0 to the number of rows 4, got 0 to 5": (x[:4], weight, bias, offsets),
        r"x must be float32, bfloat16 or float16, got": (*double, offsets),
    }.items():
        with pytest.raises(ValueError, match=match):
            winograd_conv2d(*args)


def test_bitwise_equal_for_any_number_of_threads() -> None:
    s = Source(torch.float32)
    x, weight, offsets = s.randn(90, 5, 9, 8), s.randn(3, 6, 5, 3, 3), s.offsets((70, 1, 19))
    grad = s.randn(90, 6, 9, 8)

    def results() -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = winograd_conv2d(*leaves, None, offsets, padding=1)
        return y, *torch.autograd.grad(y, leaves, grad)

    check_threads(results)
