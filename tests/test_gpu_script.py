"""`make gpu` as a dry run on the CPU: the whole script, failures, and a sudden end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
SCRIPT = [sys.executable, str(ROOT / "checks/gpu.py")]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "TRITON_INTERPRET": "1"}


@pytest.fixture(autouse=True)
def script_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "checks")


def lines(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.rglob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_dry_run_does_everything(tmp_path: Path) -> None:
    """In the order in which it runs on a GPU."""
    import gpu_device
    import gpu_jobs

    script = [*SCRIPT, "--dry-run", "--results", str(tmp_path)]
    done = subprocess.run(script, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.rglob("*.json")
    results = json.loads(path.read_text())
    assert results["checks"]["failed"] == results["not_measured"] == results["cut_off"] == []
    assert results["checks"]["passed"] >= 70
    assert {"torch", "triton", "commit", "date"} <= results["versions"].keys()
    kernels = {row["kernel"] for row in results["speed"]}
    assert {"expert_linear dW", "expert_conv2d dX", "combine", "RobustMoE backward", "attack step"} <= kernels
    assert {"RT-ER step, step by step", "RT-ER step, captured", "PGD-2, captured"} <= kernels
    begin, *found = lines(tmp_path)
    assert [e["name"] for e in found if e["kind"] == "job"] == begin["plan"]
    first_figure = next(i for i, e in enumerate(found) if e["kind"] == "speed")
    smoke = [i for i, e in enumerate(found) if e.get("name", "").startswith("smoke ")]
    assert len(smoke) == len(gpu_device.first_cases()) and max(smoke) < first_figure
    assert not any("winograd" in e.get("name", "") for e in found)  # a GPU has no kernel for it
    assert gpu_jobs.LIMIT <= 360


def test_the_most_important_jobs_come_first() -> None:
    """In case the machine is lost midway: build and warm, smoke, speed, cases, then the rest."""
    import gpu_jobs

    plan = [list(dict.fromkeys(job.part for job in stage.jobs)) for stage in gpu_jobs.STAGES]
    assert plan == [
        ["build", "warm"],
        ["smoke"],
        ["speed"],
        ["graphs", "first act", "syncs", "cases"],
        ["kernel tests", "cases", "compilation"],
        ["tuned"],
    ]
    assert [job.which for job in gpu_jobs.STAGES[2].jobs] == list(gpu_jobs.SECTIONS)
    assert gpu_jobs.STAGES[2].at_a_time == 1  # timings run alone
    assert [str(j) for s in gpu_jobs.STAGES for j in s.jobs if j.essential] == ["build", "smoke"]
    names = [str(job) for stage in gpu_jobs.STAGES for job in stage.jobs]
    assert len(names) == len(set(names))


def test_a_killed_run_leaves_its_results(tmp_path: Path) -> None:
    """After SIGKILL in the middle, every complete line can be read, and --summary says what was cut off."""
    process = subprocess.Popen(
        [*SCRIPT, "--dry-run", "--results", str(tmp_path)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("build"):
            break
    while not any(e["kind"] == "warm" for e in lines(tmp_path)):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (path,) = tmp_path.rglob("*.jsonl")
    with path.open("a") as file:
        file.write('{"kind": "speed", "kern')  # torn
    done = subprocess.run([*SCRIPT, "--summary", str(path)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cut off: warm 0/8, smoke, speed RT-ER step" in done.stdout and done.stdout.rstrip().endswith("tuned")


def entries(tmp_path: Path, perform: Any, seconds: float = 60) -> list[dict[str, Any]]:
    """The report of a run of the plan in which `perform` stands in for every job."""
    import gpu_jobs
    from gpu_report import Report

    report = Report(tmp_path / "report.jsonl")
    report.add(kind="begin", plan=[str(job) for stage in gpu_jobs.STAGES for job in stage.jobs])
    gpu_jobs.Runner(report, time.perf_counter() + seconds, perform).run_all(gpu_jobs.STAGES)
    return report.entries()


@pytest.mark.parametrize("part", ["build", "smoke"])
def test_nothing_runs_after_a_failed_build_or_smoke_test(part: str, tmp_path: Path) -> None:
    from gpu_report import summary

    found = summary(entries(tmp_path, lambda job, seconds: "a fault" if job.part == part else ""))
    assert [e["name"] for e in found["checks"]["failed"]] == [part]
    assert "speed RT-ER step" in found["cut_off"] and part not in found["cut_off"]


def test_other_failures_stop_no_job(tmp_path: Path) -> None:
    from gpu_report import summary, table

    found = summary(entries(tmp_path, lambda job, seconds: "a fault" * (job.part in ("graphs", "speed"))))
    assert [e["name"] for e in found["checks"]["failed"]] == ["graphs"]
    assert "speed layer" in {e["name"] for e in found["not_measured"]}
    assert found["cut_off"] == []
    assert "FAILED graphs: a fault" in table(found)


def test_jobs_after_the_deadline_are_cut_off(tmp_path: Path) -> None:
    from gpu_report import summary, table

    def slow(job: Any, seconds: float) -> str:
        if job.part != "speed":
            return ""
        time.sleep(seconds)
        return "did not finish"

    found = summary(entries(tmp_path, slow, seconds=3))
    assert found["cut_off"][:2] == ["speed RT-ER step", "speed attack step"] and found["cut_off"][-1] == "tuned"
    assert found["checks"]["failed"] == []
    assert "cut off: speed RT-ER step" in table(found)


def test_each_figure_is_written_at_once(tmp_path: Path) -> None:
    from gpu_contest import Contest
    from gpu_report import Report, summary
    from roofline import Work

    report, seen = Report(tmp_path / "report.jsonl"), []

    class Device:
        dry, name = True, "cpu"

        def milliseconds(self, function: Any, budget: int) -> float:
            seen.append([e["kind"] for e in report.entries()])
            if function() == "hangs":
                raise RuntimeError("cuDNN has no such kernel")
            return 2.0

    contest = Contest(Device(), report)  # type: ignore[arg-type]
    contest(Work("k", "s", 10), lambda: 1, None, {"other": lambda: 2, "broken": lambda: "hangs"})
    assert seen == [[], ["speed", "time"], ["speed", "time", "beside", "time"]]
    (row,) = summary(report.entries())["speed"]
    assert row["ms"] == 2.0 and row["beside_ms"] == {"other": 2.0}


def test_a_fault_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    from gpu_report import Report, summary

    report = Report(tmp_path / "report.jsonl")
    assert not report.check("divides", lambda: print(1 / 0))
    assert not report.check("times", lambda: print([][0]), "time")
    assert report.check("works", lambda: None)
    results = summary(report.entries())
    (failed,), (not_measured,) = results["checks"]["failed"], results["not_measured"]
    assert results["checks"]["passed"] == 1
    assert failed["name"] == "divides" and "ZeroDivisionError" in failed["error"]
    assert not_measured["name"] == "times" and "IndexError" in not_measured["error"]


def test_a_process_that_dies_or_hangs_is_a_failure() -> None:
    from gpu_jobs import run

    def python(code: str, seconds: float = 30) -> str:
        return run([sys.executable, "-c", code], dict(os.environ), seconds)

    assert python("") == ""
    assert "status -11: some output" in python("import os; print('some output', flush=True); os.kill(os.getpid(), 11)")
    hangs = python("import time; print('begun', flush=True); time.sleep(60)", 3)
    assert hangs.startswith("did not finish within 3 s") and "begun" in hangs
    assert "No such file" in run(["./nothing-of-this-name"], {}, 1)


def test_the_commands_that_run_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build is for this GPU only; the sanitizer is tried once, and skipped if it does not start."""
    import gpu_jobs
    from gpu_report import Report

    calls: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], environment: dict[str, str], seconds: float) -> str:
        calls.append((command, environment))
        return "Device not supported" if "-c" in command else ""

    monkeypatch.setattr(gpu_jobs, "run", run)
    monkeypatch.setattr(gpu_jobs, "_probed", [])
    report = Report(tmp_path / "report.jsonl")
    for stage in gpu_jobs.STAGES:
        for job in stage.jobs:
            assert gpu_jobs.on_gpu(job, 60, report, (9, 0)) == ""
    (build, environment), *others = calls
    assert build[1:] == ["setup.py", "-q", "build_ext", "--inplace"]
    assert environment["TORCH_CUDA_ARCH_LIST"] == "9.0a" and environment["MOE_KERNELS_CUDA"] == "1"
    assert gpu_jobs.architecture((8, 0)) == "8.0" and gpu_jobs.architecture((10, 0)) == "10.0"
    probes = [command for command, _ in others if "--tool" in command and "-c" in command]
    assert len(probes) == 1 and {"--report-api-errors", "kns=moe"} <= set(probes[0])
    skipped = {e["name"]: e["reason"] for e in report.entries() if e["kind"] == "skipped"}
    assert skipped == dict.fromkeys(["cases under memcheck", "cases under racecheck"], "Device not supported")
    assert not any("initcheck" in command for command, _ in calls)


def test_jobs_run_only_operators_that_the_gpu_has() -> None:
    """All operators but winograd_conv2d, which exists on the CPU only, have a kernel and cases on a GPU."""
    import gpu_device

    from moe_kernels import testing

    asked = {case.op for case in gpu_device.Gpu.cases}
    assert {case.op for case in testing.CASES} - asked == {"winograd_conv2d"}
    assert {case.op for case in gpu_device.first_cases()} == asked
    assert gpu_device.Gpu.sanitized < asked


def test_a_missing_gpu_is_reported() -> None:
    hidden = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(SCRIPT, env=hidden, capture_output=True, text=True)
    assert done.returncode == 2 and "must see a GPU, got none; --dry-run rehearses" in done.stderr
