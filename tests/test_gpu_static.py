"""`make gpu-static` in small: GEMMs compiled without a GPU, and the judgement on what it finds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
# architecture: (shared memory of a block in KB, matrix instruction); 86 and 120 are consumer GPUs
EXPECTED = {86: (99, "HMMA"), 90: (227, "HGMMA"), 120: (99, "HMMA")}


def test_gemms_compile_to_tensor_cores_without_spills() -> None:
    script = [sys.executable, ROOT / "benchmarks/gpu_static.py", "--arch", *map(str, EXPECTED)]
    script += ["--match", "linear swiglu gather 16-bit many|linear dW gather 16-bit many|forward 16-bit 512 to 512"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line for line in run.stdout.splitlines() if " sm_" in line]
    assert len(lines) == 3 * len(EXPECTED)
    for line in lines:
        arch, registers, shared, spills, stack, tensor_core = line.split(" sm_")[1].split()[:6]
        shared_kb, instruction = EXPECTED[int(arch)]
        assert (spills, stack, tensor_core) == ("0", "0", instruction), line
        assert 0 < int(registers) <= 255 and 0 < int(shared) <= shared_kb * 1024, line
