"""A kernel launch as an object: run on a device, or compiled for any architecture without a device."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.triton_kernels import interpreter

if triton.knobs.runtime.interpret and interpreter.NEEDS_PATCH:
    interpreter.patch_loop_bounds()


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel; `tensor_cores` requires that its compiled code uses them."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    tensor_cores: bool = False

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options())

    def compile(self) -> None:
        """Compiles the kernel for the current device, as the first run() would."""
        self.kernel.warmup(**self.arguments, grid=self.grid, **self.options())

    def options(self) -> dict[str, int]:
        """Compiler options. Fused multiply-adds are allowed, which Triton 3.10 and later must be told."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def descriptor(x: Tensor, block: list[int]) -> TensorDescriptor | None:
    """A TMA descriptor for blocks of x, or None where x's layout does not allow one.

    TMA's strides are positive multiples of 16 bytes, which excludes an axis of stride 0 as made by expand().
    """
    aligned = x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
    if x.stride(-1) != 1 or not aligned or x.numel() == 0:
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def strides(name: str, x: Tensor | None, axes: str) -> dict[str, int]:
    """{"<name>_stride_<axis>": stride}; all strides are zero where x is None."""
    values = [0] * len(axes) if x is None else x.stride()
    return {f"{name}_stride_{axis}": stride for axis, stride in zip(axes, values, strict=True)}


def num_programs(tiles: int, x: Tensor) -> int:
    """Number of programs in a persistent grid: at most one per multiprocessor of x's GPU, or four without a GPU."""
    return min(tiles, torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4)
