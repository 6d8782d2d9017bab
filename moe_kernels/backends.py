"""The only place that chooses between the implementations of an operator."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moe_kernels import _library, reference


def choose(op: str, backend: str | None, x: Tensor) -> Callable[..., Any]:
    """The callable that computes `op` on x's device: the native operator, or the plain-torch reference."""
    if backend == "reference":
        return getattr(reference, op)
    if backend is not None:
        raise ValueError(f'backend must be None or "reference", got {backend!r}')
    device = x.device.type
    if device != "meta" and not is_implemented(op, device):
        why = f" ({_library.cuda_problem})" if device == "cuda" and _library.cuda_problem else ""
        raise RuntimeError(f'{op} has no {device} implementation in this build{why}; backend="reference" computes it')
    return _library.OPERATORS[op]


def is_implemented(op: str, device: str) -> bool:
    """Whether the native operator has a kernel for this device type in the libraries that are loaded."""
    return (op, device) in _library.KERNELS
