"""winograd_conv2d beyond the common contract and the tests for both convolutions in test_expert_conv2d.py."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels import _library
from moe_kernels.nn import ExpertConv2d
from moe_kernels.ops import expert_conv2d, winograd_conv2d
from moe_kernels.ops.winograd_conv2d import saves_work
from moe_kernels.testing import InOrder, Source, check_threads


def arguments(channels: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = Source(torch.float32)
    return s.randn(5, channels, 6, 7), s.randn(3, 4, channels, 3, 3), s.randn(3, 4), s.offsets((2, 0, 3))


def test_rounds_at_most_twice_as_much_as_a_direct_convolution() -> None:
    s = Source(torch.float32)
    x, weight, offsets = s.randn(2, 128, 16, 16), s.randn(1, 128, 128, 3, 3), s.offsets((2,))
    exact = F.conv2d(x.double(), weight[0].double(), None, 1, 1)
    with InOrder():
        direct = F.conv2d(x, weight[0], None, 1, 1)
    error, usual = ((y - exact).square().mean() for y in (winograd_conv2d(x, weight, None, offsets, 1), direct))
    assert error < 4 * usual


def test_equals_a_loop_of_convolutions() -> None:
    x, weight, bias, offsets = arguments()
    parts = [F.conv2d(x[:2], weight[0], bias[0], 1, (0, 2)), F.conv2d(x[2:], weight[2], bias[2], 1, (0, 2))]
    torch.testing.assert_close(
        winograd_conv2d(x, weight, bias, offsets, (0, 2)), torch.cat(parts), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "counts, channels, outputs, size",
    [
        ((70, 0, 35), 5, 6, (9, 8)),
        ((37, 3), 16, 17, (8, 8)),
        ((3, 1), 33, 4, (5, 300)),
        ((130,), 17, 50, (4, 4)),
        ((*(9 * (1,)), 40), 6, 16, (9, 8)),
    ],
    ids=["idle expert", "half a panel", "wide images", "small images", "one large expert of many"],
)
def test_many_tiles_equal_a_convolution(
    counts: tuple[int, ...], channels: int, outputs: int, size: tuple[int, int], layout: torch.memory_format
) -> None:
    """More than are transformed at a time: those of an expert are summed in parts, or experts are shared by threads."""
    s = Source(torch.float32)
    x, weight = s.randn(sum(counts), channels, *size), s.randn(len(counts), outputs, channels, 3, 3)
    grad = s.randn(sum(counts), outputs, *size).contiguous(memory_format=layout)
    leaves = [x.contiguous(memory_format=layout).requires_grad_(), weight.requires_grad_()]
    y = winograd_conv2d(*leaves, None, s.offsets(counts), padding=1)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    parts = zip(wide[0].split(counts), wide[1], strict=True)
    exact = torch.cat([F.conv2d(rows, kernels, None, 1, 1) for rows, kernels in parts])
    found = (y, *torch.autograd.grad(y, leaves, grad))
    for ours, theirs in zip(found, (exact, *torch.autograd.grad(exact, wide, grad.double())), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_every_layout_gives_the_same_bits() -> None:
    x, weight, bias, offsets = arguments()
    last = winograd_conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias, offsets, 1)
    assert torch.equal(last, winograd_conv2d(x, weight, bias, offsets, 1))


def test_second_derivatives_are_those_of_expert_conv2d() -> None:
    x, weight, bias, offsets = arguments()

    def derivatives(op: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = op(*leaves, offsets, padding=1)
        first = torch.autograd.grad(y.tanh().sum(), leaves, create_graph=True)
        return (*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    for ours, expected in zip(derivatives(winograd_conv2d), derivatives(expert_conv2d), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_nan_and_infinity_stay_in_their_tiles() -> None:
    x, weight, offsets = torch.ones(1, 1, 12, 12), torch.ones(1, 1, 1, 3, 3), Source(torch.float32).offsets((1,))
    x[0, 0, 5, 5] = torch.nan
    wrong = winograd_conv2d(x, weight, None, offsets, 1)[0, 0].isnan()
    expected = torch.zeros_like(wrong)
    expected[4:8, 4:8] = True
    assert torch.equal(wrong, expected)


def test_a_layer_uses_it_where_it_saves_work() -> None:
    s = Source(torch.float32)
    x, offsets = s.randn(5, 16, 12, 12), s.offsets((2, 0, 3))
    for saves, layer in {
        True: ExpertConv2d(3, 16, 16, 3, padding=1),
        False: ExpertConv2d(3, 16, 16, 3, stride=2, padding=1),
    }.items():
        direct = expert_conv2d(x, layer.weight, layer.bias, offsets, layer.stride, layer.padding)
        y = layer(x, offsets)
        assert torch.equal(y, winograd_conv2d(x, layer.weight, layer.bias, offsets, 1) if saves else direct)
        assert torch.equal(y, direct) != saves
        layer.double()
        direct = expert_conv2d(x.double(), layer.weight, layer.bias, offsets, layer.stride, layer.padding)
        assert torch.equal(layer(x.double(), offsets), direct)
        with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
            assert torch.equal(layer(x.double(), offsets), direct)


@pytest.mark.parametrize("level", ["x86-64-v3", "x86-64-v4"])
def test_few_tiles_are_left_to_the_vendor(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of 4 x 4 results, and of 5 x 5 results, whose four tiles lie mostly beyond the edge."""
    monkeypatch.setattr(_library, "level", level)
    fewest = {"x86-64-v3": {16: 9, 64: 9}, "x86-64-v4": {16: 8, 64: 4}}[level]
    for channels, tiles in fewest.items():
        for experts in (1, 3):
            weight = torch.ones(experts, channels, channels, 3, 3)
            for count, saves in ((tiles * experts - 1, False), (tiles * experts, True)):
                assert saves_work(torch.ones(count, channels, 4, 4), weight, 1, 1) is saves
    assert not saves_work(torch.ones(99, 64, 5, 5), torch.ones(64, 64, 3, 3), 1, 1)


def test_bad_input_names_the_argument() -> None:
    x, weight, bias, offsets = arguments()
    double = [t.double() for t in (x, weight, bias)]
    for match, args in {
        r"x must have 4 dimensions, got shape \[3, 6, 7\]": (x[0], weight, bias, offsets),
        r"weight must be \[E, O, C, 3, 3\] with C = x.shape\[1\]": (x, weight[..., :2], bias, offsets),
        r"weight must have the dtype of x, torch.float32, got torch.float64": (x, weight.double(), bias, offsets),
        r"weight must have at least one .* got shape \[3, 0, 3, 3, 3\]": (x, weight[:, :0], None, offsets),
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


@pytest.mark.parametrize(
    "counts, width",
    [((70, 1, 35), 6), ((2, 0, 1), 70), (10 * (1, 2), 6), (10 * (1, 0), 6)],
    ids=["many blocks", "few blocks", "many experts", "idle experts"],
)
def test_bitwise_equal_for_any_number_of_threads(counts: tuple[int, ...], width: int) -> None:
    s = Source(torch.float32)
    x, weight, offsets = s.randn(sum(counts), 5, 9, 8), s.randn(len(counts), width, 5, 3, 3), s.offsets(counts)
    grad = s.randn(sum(counts), width, 9, 8)

    def results() -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = winograd_conv2d(*leaves, None, offsets, padding=1)
        return y, *torch.autograd.grad(y, leaves, grad)

    check_threads(results)
