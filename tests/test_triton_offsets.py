"""Offsets beyond 2^31 elements in every Triton kernel: operands spread over sparse memory give the results of packed
ones."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moe_kernels.testing import Source
from moe_kernels.triton_kernels.configs import Tile
from moe_kernels.triton_kernels.expert_conv2d import expert_conv2d, expert_conv2d_input_grad
from moe_kernels.triton_kernels.expert_conv2d_weight_grad import expert_conv2d_weight_grad
from moe_kernels.triton_kernels.expert_linear import expert_linear, forward_launch
from moe_kernels.triton_kernels.expert_linear_weight_grad import expert_linear_weight_grad
from moe_kernels.triton_kernels.expert_mlp import expert_mlp_hidden_grad, hidden_grad_launch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the memory is a file's")

FAR = 2**31
TILE = Tile(16, 32, 16, num_warps=4, num_stages=2)
TMA = TILE._replace(tma=True)
DTYPE = torch.float16  # TMA descriptors of small widths
s = Source(DTYPE)
OFFSETS = s.offsets((3, 0, 4))
X, GRAD = s.randn(7, 24), s.randn(7, 40)
WEIGHT, BIAS = s.randn(3, 40, 24), s.randn(3, 40)
ROWS = torch.tensor([6, 0, 3, 3, 5, 1, 2], dtype=torch.int32)
IMAGES, DOUT, KERNELS = s.randn(7, 6, 4, 3), s.randn(7, 5, 4, 3), s.randn(3, 5, 6, 3, 3)
SETTINGS: dict[str, Any] = {"stride": (1, 1), "padding": (1, 1), "tile": TILE}

Call = tuple[Callable[..., Tensor], tuple[Any, ...]]
CALLS: dict[str, Call] = {
    "expert_linear": (partial(expert_linear, tile=TILE), (X, WEIGHT, BIAS, OFFSETS)),
    "expert_linear by TMA": (partial(expert_linear, tile=TMA), (X, WEIGHT, BIAS, OFFSETS)),
    "expert_linear gated": (partial(expert_linear, activation="swiglu", tile=TILE), (X, WEIGHT, BIAS, OFFSETS, ROWS)),
    "expert_linear dX": (
        lambda grad, weight: expert_linear(grad, weight.transpose(1, 2), None, OFFSETS, tile=TMA),
        (GRAD, WEIGHT),
    ),
    "expert_linear dW": (
        lambda grad, x, out: expert_linear_weight_grad(grad, x, OFFSETS, ROWS, out=out, tile=TILE),
        (GRAD, X, torch.zeros(3, 40, 24, dtype=DTYPE)),
    ),
    "expert_linear dW by TMA": (
        lambda grad, x, out: expert_linear_weight_grad(grad, x, OFFSETS, out=out, tile=TMA),
        (GRAD, X, torch.zeros(3, 40, 24, dtype=DTYPE)),
    ),
    "expert_conv2d": (partial(expert_conv2d, **SETTINGS), (IMAGES, KERNELS, s.randn(3, 5), OFFSETS)),
    "expert_conv2d dX": (
        lambda grad, weight: expert_conv2d_input_grad(grad, weight, OFFSETS, 4, 3, **SETTINGS),
        (DOUT, KERNELS),
    ),
    "expert_conv2d dW": (
        lambda grad, x: expert_conv2d_weight_grad(grad, x, OFFSETS, 3, 3, **SETTINGS),
        (DOUT, IMAGES),
    ),
}
EACH_AXIS = [
    pytest.param(name, i, axis, id=f"{name}-argument {i}-axis {axis}")
    for name, (_, args) in CALLS.items()
    for i, x in enumerate(args)
    if isinstance(x, Tensor) and x.is_floating_point()
    for axis in range(x.ndim)
]


@pytest.fixture
def sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, torch.dtype], Tensor]:
    """Makes zeros in a sparse file, which takes space only for pages that were written."""
    copy = torch.UntypedStorage.copy_

    def copy_others(self: torch.UntypedStorage, source: torch.UntypedStorage, *args: Any) -> torch.UntypedStorage:
        """Skips copies of a storage onto itself: the interpreter copies every argument's whole storage back."""
        return self if self.data_ptr() == source.data_ptr() else copy(self, source, *args)

    monkeypatch.setattr(torch.UntypedStorage, "copy_", copy_others)

    def make(size: int, dtype: torch.dtype) -> Tensor:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype)

    return make


def spread(x: Tensor, axis: int, sparse: Callable[[int, torch.dtype], Tensor]) -> Tensor:
    """x with the last index of an axis more than 2^31 elements after the first. As far before the first, where a 32-bit
    offset would wrap to, there are zeros."""
    stride = list(x.stride())
    stride[axis] = (FAR // (x.shape[axis] - 1) // 64 + 1) * 64
    reach = sum((size - 1) * step for size, step in zip(x.shape, stride, strict=True))
    assert reach > FAR
    return sparse(FAR + reach + 1, x.dtype).as_strided(x.shape, stride, FAR).copy_(x)


@pytest.mark.parametrize(("name", "argument", "axis"), EACH_AXIS)
def test_large_strides(name: str, argument: int, axis: int, sparse: Callable[[int, torch.dtype], Tensor]) -> None:
    call, packed = CALLS[name]
    far = [spread(x, axis, sparse) if i == argument else x for i, x in enumerate(packed)]
    assert torch.equal(call(*far), call(*packed))


@pytest.mark.parametrize("activation", [None, "gelu", "swiglu"])
def test_the_last_rows_of_a_large_result(activation: str | None, sparse: Callable[[int, torch.dtype], Tensor]) -> None:
    """The last rows of a result and a pre-activation of more than 2^31 elements."""
    args = X[:3], WEIGHT[:1], BIAS[:1], OFFSETS[:2]
    z = torch.empty(3, 40, dtype=DTYPE)
    expected = expert_linear(*args, activation=activation, z=z, tile=TILE)
    width = expected.shape[1]
    num_rows = FAR // width + 8
    rows, offsets = sparse(num_rows, torch.int32), OFFSETS[:2] + num_rows - 3
    rows[-3:] = torch.arange(3, dtype=torch.int32)
    y, far_z = sparse(num_rows * width, DTYPE).view(num_rows, width), sparse(num_rows * 40, DTYPE).view(num_rows, 40)
    launch = forward_launch(*args[:3], offsets, rows, y, far_z, activation, TILE)
    dataclasses.replace(launch, grid=(1,)).run()
    assert torch.equal(y[-3:], expected)
    assert activation is None or torch.equal(far_z[-3:], z)


def test_the_last_rows_of_a_large_hidden_gradient(
    sparse: Callable[[int, torch.dtype], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of the last program, of more than 2^31 elements."""
    from triton.runtime.interpreter import interpreter_builder as builder

    n, height = 64, 4
    packed = s.randn(height, n), s.randn(height, 2 * n), s.randn(height).float()
    expected = expert_mlp_hidden_grad(*packed, "swiglu")
    num_rows = FAR // n + height
    far = [sparse(num_rows * x[0].numel(), x.dtype).view(num_rows, *x.shape[1:]) for x in (*packed, *expected)]
    for x, values in zip(far, packed, strict=False):
        x[-height:] = values
    launch = hidden_grad_launch(*far[:3], "swiglu", far[3:], (height, n))
    last = launch.grid[0] - 1, 0, 0
    monkeypatch.setattr(builder, "set_grid_idx", lambda *index: setattr(builder, "grid_idx", last))
    dataclasses.replace(launch, grid=(1,)).run()
    assert all(torch.equal(x[-height:], values) for x, values in zip(far[3:], expected, strict=True))
