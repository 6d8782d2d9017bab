"""A test case: one operator's arguments, drawn from a seed in any dtype on any device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# The number of rows of each expert in a sorted batch.
GROUPS: dict[str, tuple[int, ...]] = {
    "no_rows": (0, 0, 0),
    "one_row": (0, 1, 0),
    "one_expert_takes_all": (0, 9, 0),
    "an_expert_gets_none": (4, 0, 5),
    "single_expert": (7,),
    "odd_sizes": (63, 100, 129),
}


class Source:
    """Seeded random arguments of one dtype on one device; inputs are of order 1."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def wide(self) -> torch.dtype:
        """The dtype of statistics and gate weights: fp32 beside 16-bit inputs, else the inputs' own."""
        return torch.promote_types(self.dtype, torch.float32)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers, drawn in fp64 so that every dtype gets the same ones up to its rounding."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x.to(dtype or self.dtype).to(self.device)

    def rand(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uniform numbers in [0, 1), drawn in fp64 like those of `randn`."""
        x = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return x.to(dtype or self.dtype).to(self.device)

    def randint(self, high: int, *shape: int) -> Tensor:
        """int32 numbers in [0, high)."""
        return torch.randint(high, shape, generator=self.generator, dtype=torch.int32).to(self.device)

    def offsets(self, counts: Sequence[int]) -> Tensor:
        """int32 offsets [E + 1] of a sorted batch with counts[e] rows of expert e."""
        return torch.tensor([0, *counts]).cumsum(0).int().to(self.device)

    def strided(self, x: Tensor) -> Tensor:
        """The same values with a NaN between neighbours in memory."""
        gaps = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        gaps[..., ::2] = x
        return gaps[..., ::2]

    def channels_last(self, x: Tensor) -> Tensor:
        """The same values in channels-last memory."""
        return x.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Case:
    """Arguments for one operator; `make` draws them from a source of a given dtype.

    `gradcheck` is False where the gradient is by definition not the derivative, as with a straight-through gate.
    """

    op: str
    name: str
    make: Callable[[Source], tuple[Any, ...]]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    gradcheck: bool = True
    buffers: tuple[int, ...] = ()  # positions of floating-point arguments without a gradient
    has_gradient: bool = True

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def arguments(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        return self.make(Source(dtype, device, seed))
