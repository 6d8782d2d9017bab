"""What was built, and which implementation each operator uses on this machine."""

import inspect
import platform
from typing import Any

import torch

from moe_kernels import _library, _torch, ops
from moe_kernels.backends import is_implemented

__version__ = "0.1.0"


def build_info() -> dict[str, Any]:
    """What is built, and for every operator with a `backend` argument the implementation that each device uses here."""
    from moe_kernels import _C  # type: ignore[attr-defined]

    library = _library.cuda_library()
    cuda = f"{library.name} of CUDA {_C.built_with_cuda} for {_C.cuda_archs}" if library else "not built"
    return {
        "moe_kernels": __version__,
        "torch": torch.__version__,
        "built_with_torch": _C.built_with_torch,
        "compiler": _C.compiler,
        "cpu_level": f"{_library.level} of {_C.cpu_levels}",
        "cpu_bf16": _cpu_bf16(),
        "cuda_library": f"{cuda}; not loaded: {_library.cuda_problem}" if library and _library.cuda_problem else cuda,
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "operators": {
            op: {"cpu": _implementation(op, "cpu"), "cuda": _implementation(op, "cuda"), "reference": "torch"}
            for op in ops.__all__
            if inspect.isfunction(getattr(ops, op))  # the others are derivatives of these
        },
    }


def _cpu_bf16() -> str:
    if platform.machine() not in ("x86_64", "AMD64"):
        return "unknown"  # torch tells it of x86 alone
    return "in hardware" if _torch.cpu_multiplies_bf16() else "emulated"


def _implementation(op: str, device: str) -> str:
    """What computes `op` on a device; under a CPU build of torch, what the CUDA library would compute."""
    from moe_kernels import _C  # type: ignore[attr-defined]

    if device == "cuda":
        if op in _library.TRITON:
            return "Triton"
        if op in _library.COMPOSED:
            return "composed"
        return "CUDA C++" if op in _C.cuda_operators.split() and not _library.cuda_problem else "none"
    names = [name for name in (op, f"{op}_forward") if hasattr(torch.ops.moe_kernels, name)]
    return "C++" if any(is_implemented(name, device) for name in names) else "none"
