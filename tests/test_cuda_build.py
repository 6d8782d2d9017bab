"""What the build says about CUDA is what lies there: a library for the three architectures, or none."""

import shutil
import subprocess

from moe_kernels import _C, _library

ARCHITECTURES = {"sm_80", "sm_90a", "sm_100"}


def test_cuda_library_holds_every_architecture() -> None:
    library = _library.cuda_library()
    if library is None:
        assert _C.cuda_archs == ""
        return
    held = set(_C.cuda_archs.split())
    if cuobjdump := shutil.which("cuobjdump"):
        listing = subprocess.run([cuobjdump, "-lelf", str(library)], capture_output=True, text=True, check=True).stdout
        held &= {line.split(".")[-2] for line in listing.splitlines() if line.endswith(".cubin")}
    assert held == ARCHITECTURES
