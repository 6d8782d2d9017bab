"""The only place that chooses between the implementations of an operator."""

from collections.abc import Callable
from typing import Any

import torch
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


def _implementation(op: str, device: str) -> str:
    """What computes `op` on a device; under a CPU build of torch, what the CUDA library would compute."""
    from moe_kernels import _C  # type: ignore[attr-defined]

    if device == "cuda":
        built = op in _C.cuda_operators.split() and not _library.cuda_problem
        return "Triton" if op in _library.TRITON else "CUDA C++" if built else "none"
    names = [name for name in (op, f"{op}_forward") if hasattr(torch.ops.moe_kernels, name)]
    return "C++" if any(is_implemented(name, device) for name in names) else "none"


def build_info() -> dict[str, Any]:
    """What is built, and for every operator the implementation that each device would use here."""
    import moe_kernels
    from moe_kernels import _C, ops  # type: ignore[attr-defined]

    library = _library.cuda_library()
    cuda = f"{library.name} of CUDA {_C.built_with_cuda} for {_C.cuda_archs}" if library else "not built"
    return {
        "moe_kernels": moe_kernels.__version__,
        "torch": torch.__version__,
        "built_with_torch": _C.built_with_torch,
        "compiler": _C.compiler,
        "cpu_level": f"{_library.level} of {_C.cpu_levels}",
        "cuda_library": f"{cuda}; not loaded: {_library.cuda_problem}" if library and _library.cuda_problem else cuda,
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "operators": {
            op: {
                "cpu": _implementation(op, "cpu"),
                "cuda": _implementation(op, "cuda"),
                "reference": "torch",
            }
            for op in ops.__all__
            if op in moe_kernels.__all__
        },
    }
