"""`make gpu`, rehearsed: the whole script on the CPU, and what it makes of failures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def script_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_rehearsal(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    script = [sys.executable, ROOT / "benchmarks/gpu.py", "--dry-run", "--results", tmp_path]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.rglob("*.json")
    results = json.loads(path.read_text())
    assert results["checks"]["failed"] == results["not_measured"] == []
    assert results["checks"]["passed"] >= 50
    assert {"torch", "triton", "commit", "date"} <= results["versions"].keys()
    kernels = {row["kernel"] for row in results["speed"]}
    assert {"expert_linear dW", "expert_conv2d dX", "combine", "RobustMoE backward", "RT-ER step"} <= kernels


def test_a_fault_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    import gpu
    from gpu_report import Report

    report = Report(tmp_path / "report.jsonl")
    assert not report.check("divides", lambda: print(1 / 0))
    assert not report.check("times", lambda: print([][0]), "time")
    assert report.check("works", lambda: None)
    results = gpu.summary(report.entries())
    (failed,), (not_measured,) = results["checks"]["failed"], results["not_measured"]
    assert results["checks"]["passed"] == 1
    assert failed["name"] == "divides" and "ZeroDivisionError" in failed["error"]
    assert not_measured["name"] == "times" and "IndexError" in not_measured["error"]


def test_a_process_that_dies_or_hangs_is_a_failure() -> None:
    from gpu_device import run

    def python(code: str, seconds: float = 30) -> str:
        return run([sys.executable, "-c", code], dict(os.environ), seconds)

    assert python("") == ""
    assert "status -11: some output" in python("import os; print('some output', flush=True); os.kill(os.getpid(), 11)")
    assert "did not finish within 1 s" in python("import time; time.sleep(60)", 1)
    assert "No such file" in run(["./nothing-of-this-name"], {}, 1)
