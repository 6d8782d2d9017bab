"""Registers the operators torch.ops.moe_kernels.* and loads the libraries that implement them."""

import functools
import importlib
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_kernels import reference
from moe_kernels._torch import AutoDispatchBelowAutograd, has_kernel, inside_transform

NAMESPACE = "moe_kernels"
OPERATORS: dict[str, Callable[..., Any]] = {}  # by name, as this package calls them
TRITON: dict[str, str] = {}  # operator -> the file of triton_kernels that computes it on a GPU
COMPOSED: set[str] = set()  # operators that are composed of other operators on a GPU
KERNELS: set[tuple[str, str]] = set()  # (operator, device type) that the loaded libraries implement
level = ""  # instruction set of the loaded CPU library, such as x86-64-v3
cuda_problem = ""  # why a CUDA build of torch has no CUDA library
_library = torch.library.Library(NAMESPACE, "DEF")


def define(
    schema: str,
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    triton: str | None = None,
    composed: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Defines one operator from its schema, its shape rule and, if it is differentiable, its backward.

    Its CUDA implementation can be given as `triton`, the file of moe_kernels/triton_kernels that has a function of the
    operator's name, or as `composed`, a function that calls other operators.
    """
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    name = schema.split("(")[0]
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    if triton is not None:
        _library.impl(name, functools.partial(run_triton, triton, name), "CUDA")
        TRITON[name] = triton
    if composed is not None:
        _library.impl(name, torch.no_grad()(composed), "CUDA")
        COMPOSED.add(name)
    operator = getattr(torch.ops.moe_kernels, name).default
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library)
    OPERATORS[name] = operator = functools.partial(_call, name, operator, backward is not None)
    return operator


def _call(name: str, operator: Callable[..., Any], differentiable: bool, *args: Any) -> Any:
    """Without grad mode, skips what torch registers for autograd: it is Python and takes longer than many operators.
    Under torch.func and in forward mode, which the registered backward does not support, runs the reference."""
    if inside_transform():
        return getattr(reference, name)(*args)
    if not differentiable or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return operator(*args)
    with AutoDispatchBelowAutograd():
        return operator(*args)


def triton_kernel(file: str, name: str) -> Callable[..., Any]:
    """The launcher `name` in moe_kernels/triton_kernels/<file>.py; Triton is imported by the first call."""
    return getattr(importlib.import_module(f"moe_kernels.triton_kernels.{file}"), name)


def run_triton(file: str, name: str, x: Tensor, *args: Any) -> Any:
    """The CUDA implementation of an operator that Triton computes."""
    if x.dtype == torch.float64:
        raise ValueError(f'{name} takes float32, bfloat16 or float16 on a GPU, got {x.dtype}; backend="reference" may')
    with torch.cuda.device_of(x):
        return triton_kernel(file, name)(x, *args)


def load() -> None:
    """Loads the libraries and notes for which devices each operator has a kernel."""
    _load_cpu()
    _load_cuda()
    for device in ("cpu", "cuda"):
        KERNELS.update((op, device) for op in OPERATORS if has_kernel(f"{NAMESPACE}::{op}", device))


def _load_cpu() -> None:
    global level
    try:
        level = cpu_level()
        torch.ops.load_library(str(_library_file("_cpu_" + re.sub(r"\W", "_", level))))
    except (AttributeError, ImportError, OSError) as error:
        raise ImportError(f"the kernels are not built ({error}); run `pip install -e .` in the repository") from error


def _load_cuda() -> None:
    """Loads the CUDA library under a CUDA build of torch, or warns that it cannot be loaded."""
    from moe_kernels import _C  # type: ignore[attr-defined]

    global cuda_problem
    if torch.version.cuda is None:
        return
    if (library := cuda_library()) is None:
        cuda_problem = "the CUDA library was not built"
        return
    if _C.built_with_cuda.split(".")[0] != torch.version.cuda.split(".")[0]:
        cuda_problem = f"the CUDA library is for CUDA {_C.built_with_cuda}, this torch for CUDA {torch.version.cuda}"
    else:
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            cuda_problem = f"the CUDA library cannot be loaded: {error}"
    if cuda_problem:
        warnings.warn(
            f"moe_kernels: {cuda_problem}. Operators work on the CPU, but not on a GPU; for this torch, run "
            "`MOE_KERNELS_CUDA=1 pip install --force-reinstall --no-deps --no-build-isolation .` in the repository, "
            f"with nvcc of CUDA {torch.version.cuda.split('.')[0]}",
            stacklevel=2,
        )


def cpu_levels() -> list[str]:
    """The instruction sets that CPU libraries were built for and this CPU has, lowest first."""
    from moe_kernels import _C  # type: ignore[attr-defined]

    built = _C.cpu_levels.split()
    return built[: built.index(_C.best_cpu_level) + 1]


def cpu_level() -> str:
    """The best of them, or the one that MOE_KERNELS_CPU_LEVEL names, to reproduce the numbers of an older CPU."""
    here = cpu_levels()
    wanted = os.environ.get("MOE_KERNELS_CPU_LEVEL") or here[-1]
    if wanted not in here:
        raise ValueError(f"MOE_KERNELS_CPU_LEVEL must be one of {', '.join(here)} on this CPU, got {wanted!r}")
    return wanted


def _library_file(name: str) -> Path:
    """The library `name` that was built together with the module moe_kernels._C."""
    from moe_kernels import _C  # type: ignore[attr-defined]

    return Path(_C.__file__).with_name(Path(_C.__file__).name.replace("_C", name, 1))


def cuda_library() -> Path | None:
    """The CUDA library that was built together with the CPU library, if one was."""
    from moe_kernels import _C  # type: ignore[attr-defined]

    library = _library_file("_cuda")
    return library if _C.built_with_cuda and library.exists() else None
