"""`make gpu-static` in small: one GEMM compiled for Hopper without a GPU, and the judgement on what it finds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent


def test_a_gemm_compiles_to_hopper_tensor_cores_without_spills() -> None:
    script = [sys.executable, ROOT / "benchmarks/gpu_static.py", "--arch", "90", "--match", "dX 16-bit few"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    (line,) = [line for line in run.stdout.splitlines() if "sm_90" in line]
    registers, shared, spills, stack, tensor_core = line.split("sm_90")[1].split()[:5]
    assert (spills, stack, tensor_core) == ("0", "0", "HGMMA")
    assert 0 < int(registers) < 255 and 0 < int(shared) <= 227 * 1024
