"""`make gpu`: every proof and every figure that needs a GPU, into benchmarks/results/<device>/<date>-<commit>.json.

Correctness first, in several processes at a time, then speed, alone. Each job has its own time limit, and none takes
another down. Exits with 1 if anything was wrong or unfinished, whereas a benchmark that fails is only recorded.
`--dry-run` rehearses all of it on the CPU with tiny sizes.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1" if "--dry-run" in sys.argv else "0")  # read when triton is imported

import gpu_checks
import gpu_speed
import torch
import triton
from gpu_device import ROOT, SCRIPT, Device, Gpu, Rehearsal
from gpu_report import Report

PARTS: dict[str, Callable[[Device, Report, str | None, int], None]] = {
    "cases": gpu_checks.cases,
    "tests": gpu_checks.kernel_tests,
    "graphs": gpu_checks.graphs,
    "syncs": gpu_checks.syncs,
    "compilation": gpu_checks.compilation,
    "speed": gpu_speed.speed,
    "tuned": gpu_speed.tuned,
}
CORRECTNESS = ("cases", "tests", "graphs", "syncs", "compilation")
LIMIT = 400  # seconds: with the build, eight minutes


@dataclass(frozen=True)
class Job:
    """A part of the work, on a shard of it or under a tool of compute-sanitizer."""

    part: str
    seconds: int
    tool: str | None = None
    shard: int = 0

    def __str__(self) -> str:
        return f"{self.part} under {self.tool}" if self.tool else f"{self.part} {self.shard}"

    def command(self, path: Path) -> list[str]:
        script = [sys.executable, str(SCRIPT), "--part", self.part, "--shard", str(self.shard), "--into", str(path)]
        return [*script, "--tool", self.tool] if self.tool else script


def correctness(device: Device) -> Iterator[Job]:
    for shard in range(device.shards):
        yield Job("cases", 150, shard=shard)
    for tool in device.sanitizers:
        yield Job("cases", 200, tool=tool)
    for part in CORRECTNESS[1:]:
        yield Job(part, 150)


def work(job: Job, device: Device, path: Path) -> None:
    torch.manual_seed(0)
    report = Report(path)
    report.add(kind="device", label=device.label())
    with device.prepared(job.part, job.tool):
        PARTS[job.part](device, report, job.tool, job.shard)


def run(job: Job, device: Device, folder: Path, deadline: float) -> list[dict[str, Any]]:
    """The report of a job, wherever it ended: at the latest at the deadline."""
    path = folder / f"{job}.jsonl".replace(" ", "-")
    start = time.perf_counter()
    seconds = max(1.0, min(job.seconds, deadline - start))
    error = device.run(job.command(path), job.tool, seconds, partial(work, job, device, path))
    report = Report(path)
    kind = "check" if job.part in CORRECTNESS else "time"
    report.add(kind=kind, name=str(job), ok=not error, seconds=round(time.perf_counter() - start, 1), error=error)
    entries = report.entries()
    failed = sum(not e["ok"] for e in entries if "ok" in e)
    print(f"{job!s:24} {entries[-1]['seconds']:6.1f} s  {len(entries) - 1:4} entries, {failed} failed", flush=True)
    return entries


def versions() -> dict[str, str]:
    def said(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
        except OSError:
            return ""

    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    nvcc = re.search(r"release (\S+),", said("nvcc", "--version"))
    return {
        "commit": said("git", "rev-parse", "--short", "HEAD") or "unknown",
        "changed": said("git", "status", "--porcelain", "--untracked-files=no"),
        "date": time.strftime("%Y-%m-%d"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or "none",
        "nvcc": nvcc.group(1) if nvcc else "none",
        "driver": said(*driver),
    }


def summary(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The results file: what was checked, what failed, and every figure."""
    checks = [e for e in entries if e["kind"] == "check"]
    return {
        "device": next((e["label"] for e in entries if e["kind"] == "device"), "unknown"),
        "versions": versions(),
        "checks": {"passed": sum(e["ok"] for e in checks), "failed": [e for e in checks if not e["ok"]]},
        "not_measured": [e for e in entries if e["kind"] == "time" and not e["ok"]],
        "tiles": [{k: v for k, v in e.items() if k != "kind"} for e in entries if e["kind"] == "tile"],
        "speed": [{k: v for k, v in e.items() if k != "kind"} for e in entries if e["kind"] == "speed"],
    }


def table(results: dict[str, Any]) -> str:
    """The figures in few columns."""
    lines = [f"{'kernel':44}{'ms':>9}{'floor':>9}{'of floor':>9}{'TFLOP/s':>9}{'GB/s':>8}  beside (its time / ours)"]
    for row in results["speed"]:
        beside = ", ".join(f"{who} {ms / row['ms']:.2f}" for who, ms in row["beside_ms"].items())
        figures = f"{row['ms']:9.3f}{row['floor_ms']:9.3f}{row['floor_ms'] / row['ms']:9.1%}"
        lines.append(f"{row['kernel']:44}{figures}{row['tflops']:9.1f}{row['gb_per_s']:8.0f}  {beside}")
        lines.append(f"    {row['shape']}")
    return "\n".join(lines)


def perform(device: Device, results_folder: Path) -> int:
    """Runs everything and writes the results file; the process's exit status."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(16) as pool:
        folder = Path(name)
        jobs = list(correctness(device))
        if device.dry:
            print(*("On a GPU: " + " ".join(job.command(Path("REPORT"))) for job in correctness(Gpu())), sep="\n")
        work_off = partial(run, device=device, folder=folder, deadline=start + LIMIT)
        reports = list(pool.map(work_off, jobs))
        reports += [work_off(job) for job in (Job("speed", 180), Job("tuned", 120))]
        shown = "\n".join(e["error"] for report in reports for e in report if e.get("error"))
    results = summary([entry for report in reports for entry in report])
    results["seconds"] = round(time.perf_counter() - start, 1)
    slug = re.sub(r"\W+", "-", results["device"].lower())
    path = results_folder / slug / f"{results['versions']['date']}-{results['versions']['commit']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    checks = results["checks"]
    print(shown, table(results), sep="\n")
    print(
        f"\n{checks['passed']} checks passed, {len(checks['failed'])} failed:", *(c["name"] for c in checks["failed"])
    )
    print(
        f"{len(results['speed'])} figures, {len(results['not_measured'])} not measured; {results['seconds']} s; {path}"
    )
    return 1 if checks["failed"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU")
    parser.add_argument("--results", type=Path, help="folder of the results; by default benchmarks/results")
    parser.add_argument("--part", choices=PARTS, help="run only this, in this process (what a job does)")
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--tool")
    parser.add_argument("--into", type=Path, help="file of the report of --part")
    options = parser.parse_args()
    device: Device = Rehearsal() if options.dry_run else Gpu()
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use; --dry-run rehearses on the CPU")
    if options.part is not None:
        work(Job(options.part, 0, options.tool, options.shard), device, options.into)
        return int(any(not e["ok"] for e in Report(options.into).entries() if e["kind"] == "check"))
    with tempfile.TemporaryDirectory() as scratch:
        default = Path(scratch) if options.dry_run else ROOT / "benchmarks/results"
        return perform(device, options.results or default)


if __name__ == "__main__":
    sys.exit(main())
