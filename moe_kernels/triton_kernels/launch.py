"""A kernel launch as a value: run on a device, or compiled for any architecture without one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel; `tensor_cores` says that its code must use them."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    tensor_cores: bool = False

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


def descriptor(x: Tensor, block: list[int]) -> TensorDescriptor | None:
    """A TMA descriptor for blocks of x, or None where x's layout does not allow one."""
    aligned = x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
    if x.stride(-1) != 1 or not aligned or x.numel() == 0:
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def strides(name: str, x: Tensor | None, axes: str) -> dict[str, int]:
    """{"<name>_stride_<axis>": stride}; zeros for None."""
    values = [0] * len(axes) if x is None else x.stride()
    return {f"{name}_stride_{axis}": stride for axis, stride in zip(axes, values, strict=True)}


def num_programs(tiles: int, x: Tensor) -> int:
    """Programs of a persistent grid: one per multiprocessor of x's device; four under the interpreter."""
    return min(tiles, torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4)
