"""Which CUDA library is built for which toolkit and torch, and where it finds its symbols at run time."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_kernels import _C, _library

ROOT = Path(__file__).parent.parent
TORCH = Path(torch.__file__).parent
STUB = (ROOT / "csrc/cuda/torch_cuda_stub.cpp").read_text()

library = _library.cuda_library()
built = pytest.mark.skipif(library is None, reason="the CUDA library is not built")


@built
def test_the_cuda_library_contains_the_architectures_that_it_names() -> None:
    triton = importlib.util.find_spec("triton")
    assert triton is not None and triton.submodule_search_locations
    cuobjdump = Path(triton.submodule_search_locations[0], "backends/nvidia/bin/cuobjdump")
    listing = subprocess.run([cuobjdump, "-lelf", str(library)], capture_output=True, text=True, check=True).stdout
    held = {line.split(".")[-2] for line in listing.splitlines() if line.endswith(".cubin")}
    named = set(_C.cuda_archs.split())
    assert held in (named, {architecture.rstrip("af") for architecture in named})  # older tools leave the letter out


def symbols(file: Path, kind: str) -> set[str]:
    """The symbols that a library defines or leaves undefined, apart from weak ones, which may stay undefined."""
    listing = subprocess.run(
        ["nm", "-D", f"--{kind}-only", str(file)], capture_output=True, text=True, check=True
    ).stdout
    return {words[-1] for line in listing.splitlines() if (words := line.split())[-2] not in "wv"}


def torch_symbols(file: Path) -> set[str]:
    """The undefined symbols that torch has to provide."""
    return {s for s in symbols(file, "undefined") if "@" not in s and not s.startswith(("Py", "_Py"))}


@pytest.mark.parametrize("file", [Path(_C.__file__), pytest.param(library, marks=built)], ids=["cpu", "cuda"])
def test_only_the_stable_abi_of_torch_is_used(file: Path) -> None:
    unstable = {s for s in torch_symbols(file) if not s.startswith(("aoti_torch_", "torch_"))}
    assert not unstable


@built
def test_every_symbol_of_the_cuda_library_has_its_origin() -> None:
    """What libtorch_cpu lacks comes from libtorch_cuda, which must be linked: torch loads it, but not globally."""
    assert library is not None
    missing = torch_symbols(library) - symbols(TORCH / "lib/libtorch_cpu.so", "defined")
    assert missing == set(re.findall(r'extern "C" void (\w+)\(', STUB))
    versions = {s.split("@")[1].split("_")[0] for s in symbols(library, "undefined") if "@" in s}
    major = _C.built_with_cuda.split(".")[0]
    assert versions <= {"GLIBC", "GLIBCXX", "CXXABI", "GCC", f"libcudart.so.{major}"}
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert needed >= {"libtorch_cpu.so", "libtorch_cuda.so", f"libcudart.so.{major}"}
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)


@pytest.mark.parametrize(
    ("cuda", "reason"),
    [
        ("13.0", "the CUDA library cannot be loaded: .*"),
        ("12.8", "the CUDA library is for CUDA 12.8, this torch for CUDA 13.0"),
    ],
)
def test_without_a_loadable_cuda_library_the_cpu_still_works(cuda: str, reason: str, tmp_path: Path) -> None:
    """The package with a broken CUDA library, under a torch that claims to be built with CUDA."""
    package = tmp_path / "moe_kernels"
    shutil.copytree(ROOT / "moe_kernels", package, ignore=shutil.ignore_patterns("__pycache__", "_cuda*"))
    (package / Path(_C.__file__).name.replace("_C", "_cuda")).write_bytes(b"no library")
    script = f"""
import torch
torch.version.cuda = "13.0"
import importlib.util, sys
spec = importlib.util.spec_from_file_location("moe_kernels._C", {str(package / Path(_C.__file__).name)!r})
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
_C.built_with_cuda, _C.cuda_operators = {cuda!r}, "combine"
sys.modules["moe_kernels._C"] = _C
import moe_kernels
print(moe_kernels.build_info()["cuda_library"])
print(moe_kernels.mask_relu(torch.tensor([-1.0, 2.0])).tolist())
class OnGpu:
    device = torch.device("cuda")
try:
    moe_kernels.backends.choose("combine", None, OnGpu)
except RuntimeError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-W", "always", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    info, result, error = done.stdout.splitlines()
    assert re.search(f"not loaded: {reason}$", info) and result == "[0.0, 2.0]"
    assert re.search(rf"combine has no cuda implementation in this build \({reason}\)", error)
    assert len(re.findall("UserWarning", done.stderr)) == 1, done.stderr
    assert re.search(f"UserWarning: moe_kernels: {reason}. Operators work on the CPU.*MOE_KERNELS_CUDA=1", done.stderr)


# What setup.py decides, from nvcc's version and the version in torch's files.

SETUP = SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


def toolkit(home: Path, release: str) -> Path:
    """A CUDA toolkit with an nvcc that only answers questions about its version."""
    nvcc = home / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    codes = "sm_80 sm_90" if release < "12.8" else "sm_80 sm_90 sm_100"
    nvcc.write_text(
        f"#!/bin/sh\n[ $1 = --version ] && echo 'Cuda compilation tools, release {release}' || echo {codes}\n"
    )
    nvcc.chmod(0o755)
    return nvcc


def torch_of(cuda: str | None) -> Any:
    return SETUP.Torch(Path("torch"), "2.13.0", cuda)


@pytest.mark.parametrize(
    ("cuda", "release", "wanted", "outcome"),
    [
        (None, "13.0", None, "none"),  # a CPU build of torch could never load it
        (None, "13.0", "1", "built"),
        (None, None, "1", "MOE_KERNELS_CUDA=1, but nvcc is not in .*"),
        ("13.0", "13.0", None, "built"),
        ("13.2", "13.0", None, "built"),
        ("13.0", "13.0", "0", "none"),
        ("13.0", None, None, "no CUDA library: torch 2.13.0 was built with CUDA 13.0, but nvcc is not in .*"),
        ("12.8", "13.0", None, "no CUDA library: torch 2.13.0 was built with CUDA 12.8, but .*nvcc is of CUDA 13.0;.*"),
        ("12.8", "13.0", "1", "torch 2.13.0 was built with CUDA 12.8, but .*nvcc is of CUDA 13.0; set CUDA_HOME to .*"),
        ("12.8", "13.0", "0", "none"),
        ("13.0", "13.0", "yes", "MOE_KERNELS_CUDA must be 0, 1 or unset, got 'yes'"),
    ],
)
def test_a_cuda_library_is_built_where_torch_can_load_it_or_asked_for(
    cuda: str | None,
    release: str | None,
    wanted: str | None,
    outcome: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("MOE_KERNELS_CUDA", raising=False)
    if wanted is not None:
        monkeypatch.setenv("MOE_KERNELS_CUDA", wanted)
    nvcc = toolkit(tmp_path, release) if release else None
    try:
        found = SETUP.Toolkit.find(torch_of(cuda))
    except SystemExit as error:
        assert re.fullmatch(f"moe_kernels: {outcome}", str(error))
        return
    said = capsys.readouterr().out
    if outcome == "built":
        assert found == SETUP.Toolkit(str(nvcc), release)
    else:
        assert found is None and (said == "" if outcome == "none" else re.fullmatch(f"moe_kernels: {outcome}\n", said))


@pytest.mark.parametrize(
    ("release", "named", "outcome"),
    [
        ("13.0", "", ["8.0", "9.0a", "10.0+PTX"]),
        ("12.6", "", ["8.0", "9.0a"]),
        ("13.0", "9.0a", ["9.0a"]),
        ("13.0", "8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        (
            "12.6",
            "8.0 10.0",
            "TORCH_CUDA_ARCH_LIST must hold architectures that .*nvcc knows, such as 9.0a, got '10.0'",
        ),
        (
            "13.0",
            "Hopper",
            "TORCH_CUDA_ARCH_LIST must hold architectures that .*nvcc knows, such as 9.0a, got 'Hopper'",
        ),
    ],
)
def test_architectures_are_those_named_or_known_to_the_toolkit(
    release: str, named: str, outcome: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    found: Callable[[], list[str]] = SETUP.Toolkit(str(toolkit(tmp_path, release)), release).architectures
    if isinstance(outcome, list):
        assert found() == outcome
    else:
        with pytest.raises(SystemExit, match=outcome):
            found()


@pytest.mark.parametrize(("value", "outcome"), [("3", 3), ("", os.cpu_count()), ("0", None), ("many", None)])
def test_max_jobs_bounds_the_compilers(value: str, outcome: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", value)
    if outcome is not None:
        assert SETUP.jobs() == outcome
    else:
        with pytest.raises(SystemExit, match=f"MAX_JOBS must be a positive integer, got {value!r}"):
            SETUP.jobs()


def test_torch_is_found_by_its_files_and_not_older_than_the_abi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SETUP.Torch.find() == SETUP.Torch(TORCH, torch.__version__, torch.version.cuda)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    version = tmp_path / "torch/version.py"
    version.parent.mkdir()
    version.write_text("__version__ = '2.10.0+cu128'\ncuda = '12.8'\n")
    with pytest.raises(SystemExit, match=r"torch>=2.11 is needed, .* is 2\.10\.0\+cu128"):
        SETUP.Torch.find()
