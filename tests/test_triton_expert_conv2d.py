"""The Triton kernels of expert_conv2d against the reference, under the interpreter where there is no GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_kernels import _checks, reference, testing
from moe_kernels.testing import Case, Source
from moe_kernels.triton_kernels.configs import Tile
from moe_kernels.triton_kernels.expert_conv2d import expert_conv2d, expert_conv2d_input_grad
from moe_kernels.triton_kernels.expert_conv2d_weight_grad import expert_conv2d_weight_grad

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = Tile(64, 32, 32, num_warps=4, num_stages=2)  # several tiles in each direction even for small cases


def innermost_channels(x: Tensor) -> Tensor:
    """The same values with dimension -3 innermost in memory."""
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


def image_case(
    name: str,
    counts: tuple[int, ...],
    c: int,
    o: int,
    kernel: int,
    stride: int,
    padding: int,
    size: tuple[int, int],
    bias: bool = True,
) -> Case:
    """Images and weights in the memory layout of the networks."""

    def make(s: Source) -> tuple[Any, ...]:
        x = innermost_channels(s.randn(sum(counts), c, *size))
        weight = s.randn(len(counts), o, c, kernel, kernel).div((c * kernel**2) ** 0.5)
        return x, weight, s.randn(len(counts), o) if bias else None, s.offsets(counts), stride, padding

    return Case("expert_conv2d", name, make)


LAID_OUT = [
    image_case("stem", (1, 2), 3, 17, 3, 1, 1, (5, 4)),
    image_case("several_tiles_per_image", (2, 0, 1), 5, 3, 1, 1, 0, (9, 8)),
    image_case("many_channels", (1, 1), 63, 17, 3, 2, 1, (4, 3), bias=False),
    image_case("stride_3", (1, 1), 2, 3, 2, 3, 2, (4, 5)),
    image_case("no_padding", (0, 2), 17, 5, 3, 1, 0, (4, 5)),
]
PAIRS = [(c, torch.float32) for c in [*testing.cases("expert_conv2d"), *LAID_OUT]]
PAIRS += [(c, torch.bfloat16) for c in LAID_OUT]
EVERY = pytest.mark.parametrize(
    ("case", "dtype"), [pytest.param(c, d, id=f"{c.name}-{d}".replace("torch.", "")) for c, d in PAIRS]
)


def arguments(case: Case, dtype: torch.dtype) -> tuple[Any, ...]:
    *tensors, stride, padding = case.arguments(dtype, DEVICE)
    return *tensors, _checks.pair("stride", stride, 1), _checks.pair("padding", padding, 0)


def output_grad(args: tuple[Any, ...]) -> Tensor:
    """A gradient of the output, in the output's layout."""
    y = reference.expert_conv2d(*args)
    return Source(y.dtype, DEVICE, seed=1).randn(*y.shape).contiguous(memory_format=_format(args[0]))


def _format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def assert_equals_reference(out: Tensor, function: Callable[..., Tensor], *args: Any) -> None:
    testing.assert_equals(out, function, args, out.dtype)


@EVERY
def test_forward(case: Case, dtype: torch.dtype) -> None:
    args = arguments(case, dtype)
    out = expert_conv2d(*args, tile=TILE)
    assert_equals_reference(out, reference.expert_conv2d, *args)


def test_relu() -> None:
    args = arguments(LAID_OUT[-1], torch.float32)
    out = expert_conv2d(*args, tile=TILE)
    assert torch.equal(expert_conv2d(*args, relu=True, tile=TILE), out.relu())


@EVERY
def test_input_grad(case: Case, dtype: torch.dtype) -> None:
    x, weight, _, offsets, stride, padding = args = arguments(case, dtype)
    grad_args = (output_grad(args), weight, offsets, *x.shape[2:], stride, padding)
    out = expert_conv2d_input_grad(*grad_args, tile=TILE)
    assert_equals_reference(out, reference.expert_conv2d_input_grad, *grad_args)


@EVERY
def test_weight_grad(case: Case, dtype: torch.dtype) -> None:
    x, weight, _, offsets, stride, padding = args = arguments(case, dtype)
    grad_args = (output_grad(args), x, offsets, *weight.shape[3:], stride, padding)
    out = expert_conv2d_weight_grad(*grad_args, tile=TILE)
    assert_equals_reference(out, reference.expert_conv2d_weight_grad, *grad_args)


def test_weight_grad_in_one_part_and_in_many() -> None:
    x, weight, _, offsets, stride, padding = args = arguments(LAID_OUT[-1], torch.float32)
    grad_args = (output_grad(args), x, offsets, *weight.shape[3:], stride, padding)
    for parts in (1, 3):
        out = expert_conv2d_weight_grad(*grad_args, tile=TILE, parts=parts)
        assert_equals_reference(out, reference.expert_conv2d_weight_grad, *grad_args)
        assert torch.equal(out, expert_conv2d_weight_grad(*grad_args, tile=TILE, parts=parts))


def test_layouts_are_kept() -> None:
    x, weight, bias, offsets, stride, padding = arguments(LAID_OUT[-1], torch.float32)
    for images in (x, x.contiguous()):
        y = expert_conv2d(images, weight, bias, offsets, stride, padding)
        dx = expert_conv2d_input_grad(y, weight, offsets, *x.shape[2:], stride, padding)
        dweight = expert_conv2d_weight_grad(y, images, offsets, *weight.shape[3:], stride, padding)
        assert y.is_contiguous(memory_format=_format(images))
        assert dx.stride() == images.stride()
        assert dweight.is_contiguous()


def test_any_layout_gives_the_same_bits() -> None:
    """Weights contiguous, as parameters are, or with channels innermost; images in either layout."""
    x, weight, bias, offsets, stride, padding = arguments(LAID_OUT[-1], torch.float32)
    y = expert_conv2d(x, weight, bias, offsets, stride, padding, tile=TILE)
    dx = expert_conv2d_input_grad(y, weight, offsets, *x.shape[2:], stride, padding, tile=TILE)
    dweight = expert_conv2d_weight_grad(y, x, offsets, *weight.shape[3:], stride, padding, tile=TILE)
    for images in (x, x.contiguous(), x.transpose(2, 3).contiguous().transpose(2, 3)):
        for kernels in (weight, innermost_channels(weight)):
            assert torch.equal(expert_conv2d(images, kernels, bias, offsets, stride, padding, tile=TILE), y)
            grads = expert_conv2d_input_grad(y.contiguous(), kernels, offsets, *x.shape[2:], stride, padding, tile=TILE)
            assert torch.equal(grads, dx)
        grads = expert_conv2d_weight_grad(y, images, offsets, *weight.shape[3:], stride, padding, tile=TILE)
        assert torch.equal(grads, dweight)


def test_more_positions_than_32_bits_can_count_are_refused() -> None:
    x, weight = torch.empty(2**21, 3, 32, 32, device="meta"), torch.empty(2, 4, 3, 1, 1, device="meta")
    with pytest.raises(ValueError, match=r"fewer than 2\^31 positions .* got \[2097152, 3, 32, 32\]"):
        expert_conv2d(x, weight, None, torch.empty(3, dtype=torch.int32, device="meta"), (1, 1), (0, 0))
