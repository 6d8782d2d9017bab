"""Grouped linear layers against torch's grouped GEMM, a loop, and one dense GEMM of equal FLOPs."""

import itertools
from typing import Any

import pytest
import torch
from conftest import Contest, first_is_core
from torch.nn import functional as F

from moe_kernels import expert_linear, reference
from moe_kernels.testing import Source, to_double

SHAPES = [(2048, 512, 1024, 8), (4096, 1024, 1024, 16), (1024, 64, 128, 8)]  # rows, in, out, experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", first_is_core(SHAPES), ids=str)
@pytest.mark.parametrize("name", ["moe_kernels", "dense GEMM of equal FLOPs", "F.grouped_mm", "loop of F.linear"])
def test_forward(contest: Contest, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    rows, k, n, experts = shape
    s = Source(dtype)
    args: tuple[Any, ...] = (s.randn(rows, k), s.randn(experts, n, k), None, s.offsets([rows // experts] * experts))
    x, weight, _, offsets = args
    bounds = offsets.tolist()
    contenders = {
        "moe_kernels": lambda: expert_linear(*args),
        "dense GEMM of equal FLOPs": lambda: F.linear(x, weight[0]),
        "F.grouped_mm": lambda: F.grouped_mm(x, weight.transpose(1, 2), offs=offsets[1:]),
        "loop of F.linear": lambda: torch.cat(
            [F.linear(x[a:b], weight[e]) for e, (a, b) in enumerate(itertools.pairwise(bounds))]
        ),
    }
    dense = name.startswith("dense")
    exact = None if dense else lambda: reference.expert_linear(*to_double(args))
    label = f"expert_linear {rows} x {k} x {n}, {experts} experts, {'fp32' if dtype == torch.float32 else 'bf16'}"
    with torch.no_grad():
        contest(label, contenders, name, exact, targets={"dense GEMM of equal FLOPs": ">= 0.95"})
