"""CUDA kernels against their reference on the CPU: every .cuh runs under emulation and g++'s sanitizers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simt import build
from torch import Tensor

from moe_kernels import reference, testing

PGD = [
    pytest.param(c, d, id=f"{c}-{d}".replace("torch.", ""))
    for c in testing.cases("pgd_step_")
    for d in c.dtypes
    if d == torch.float32 or not c.name.endswith("bf16_grad")
]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def save(folder: Path, **arrays: Tensor) -> None:
    for array, x in arrays.items():
        x.contiguous().flatten().view(torch.uint8).numpy().tofile(folder / array)


def load(path: Path, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.from_numpy(np.fromfile(path, name(dtype))).reshape(shape)


def emulate_pgd_step(folder: Path, args: tuple[Any, ...], shift: int = 0) -> Tensor:
    """The kernel's result; arrays begin `shift` elements past a 16-byte boundary."""
    x_adv, grad, x, eps, alpha, norm = args
    eps, alpha = (torch.as_tensor(r, dtype=x.dtype).reshape(-1) for r in (eps, alpha))
    save(folder, x_adv=x_adv, grad=grad, x=x, eps=eps, alpha=alpha)
    sizes = (x.shape[0], x[0].numel() if len(x) else 0)
    done = build.run("pgd_step_", folder, name(x.dtype), name(grad.dtype), *sizes, shift, norm, 0.0, 1.0)
    assert done.returncode == 0, done.stderr
    return load(folder / "out", x.dtype, x.shape)


def check_pgd_step(folder: Path, args: tuple[Any, ...], shift: int = 0) -> None:
    low, exact = (reference.pgd_step_(a[0].clone(), *a[1:]) for a in (args, testing.to_double(args)))
    testing.assert_matches(emulate_pgd_step(folder, args, shift), low, exact, args[2].dtype)


@pytest.mark.parametrize(("case", "dtype"), PGD)
def test_pgd_step(case: testing.Case, dtype: torch.dtype, tmp_path: Path) -> None:
    check_pgd_step(tmp_path, case.arguments(dtype))


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("grad_dtype", (*testing.DTYPES, torch.float16))
def test_pgd_step_gradients_of_any_dtype_at_any_alignment(norm: str, grad_dtype: torch.dtype, tmp_path: Path) -> None:
    source = testing.Source(torch.float32)
    x, grad = source.rand(2, 1030), source.randn(2, 1030, dtype=grad_dtype)
    grad[0, 5], grad[1, 7] = torch.nan, 0
    for shift in (0, 1):
        check_pgd_step(tmp_path, (x.clone(), grad, x, 0.2, 0.3, norm), shift)
