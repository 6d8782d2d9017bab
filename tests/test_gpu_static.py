"""A part of `make gpu-static`: GEMMs compiled without a GPU, and the faults that it must find."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
# {architecture: (shared memory of a block in KB, matrix instruction)}; 86 and 120 are consumer GPUs
EXPECTED = {86: (99, "HMMA"), 90: (227, "HGMMA"), 120: (99, "HMMA")}
GEMMS = (
    "linear swiglu gather 16-bit many",
    "linear dW gather 16-bit many",
    "conv2d (forward|dX) 16-bit 64 to 64",
    "conv2d dW 16-bit 64 to 64",
)


def run(*script: str | Path) -> list[str]:
    """The lines printed by a script in which Triton compiles instead of interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, script)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "TRITON_DEFAULT_FP_FUSION" not in result.stderr  # no environment variable may change a result
    return result.stdout.splitlines()


def test_gemms_compile_to_tensor_cores_and_wide_loads_without_spills() -> None:
    script = ROOT / "checks/gpu_static.py", "--arch", *map(str, EXPECTED), "--match", "|".join(GEMMS)
    lines = [line for line in run(*script) if " sm_" in line]
    assert len(lines) == 5 * len(EXPECTED)
    for line in lines:
        arch, registers, shared, spills, stack, tensor_core = line.split(" sm_")[1].split()[:6]
        shared_kb, instruction = EXPECTED[int(arch)]
        assert (spills, stack, tensor_core) == ("0", "0", instruction), line
        assert 0 < int(registers) <= 255 and 0 < int(shared) <= shared_kb * 1024, line


def test_faulty_kernels_are_found() -> None:
    """Two products per step in one accumulator, which some compilers have got wrong, and loads of only two bytes."""
    assert run(ROOT / "tests/faulty_kernels.py") == [
        "two accumulators: sound",
        "one accumulator: SHARED ACCUMULATOR",
        "one accumulator on a condition: SHARED ACCUMULATOR",
        "channels innermost: sound",
        "taps innermost: NARROW LOADS",
    ]
