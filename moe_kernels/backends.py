"""The only place that chooses between the implementations of an operator."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kernels import reference

DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def choose(op: str, backend: str | None, x: Tensor) -> Callable[..., Any]:
    """The callable that computes `op` on x's device: the native operator, or the plain-torch reference."""
    if backend == "reference":
        return getattr(reference, op)
    if backend is not None:
        raise ValueError(f'backend must be None or "reference", got {backend!r}')
    device = x.device.type
    if device != "meta" and not is_implemented(op, device):
        raise RuntimeError(f'{op} has no {device} implementation in this build; backend="reference" computes it')
    return getattr(torch.ops.moe_kernels, op).default


@torch.compiler.assume_constant_result
def is_implemented(op: str, device: str) -> bool:
    """Whether the native operator has a kernel for this device type in the libraries that are loaded."""
    key = DISPATCH_KEYS.get(device)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_kernels::{op}", key)
