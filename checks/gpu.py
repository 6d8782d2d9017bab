"""`make gpu`: every check and every figure that needs a GPU, in six minutes.

Build for this GPU, smoke test, speed, all cases, sanitizers, the most informative first: see `gpu_jobs.STAGES`. Every
check and figure is appended to one file as soon as it exists, so nothing is lost if the machine is taken away;
`--summary FILE` prints what such a file holds. Exits with 1 if a check failed or was cut off; a benchmark that fails is
only recorded. `--dry-run` rehearses all of it on the CPU with tiny sizes.
"""

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1" if "--dry-run" in sys.argv else "0")  # read when triton is imported

import gpu_jobs
import torch
from gpu_jobs import ROOT, Job
from gpu_report import Report, summary, table

sys.path.append(str(ROOT / "benchmarks"))  # for the kernels' floors and their rivals

PARTS = {
    "warm": "gpu_checks",
    "smoke": "gpu_checks",
    "speed": "gpu_speed",
    "cases": "gpu_checks",
    "graphs": "gpu_checks",
    "first act": "gpu_checks",
    "syncs": "gpu_checks",
    "kernel tests": "gpu_checks",
    "compilation": "gpu_checks",
    "tuned": "gpu_speed",
}


def work(part: str, which: str, tool: str, path: Path, dry: bool) -> None:
    """Does a part of the work in this process."""
    if part == "build":  # only in a rehearsal, where everything is built already
        importlib.import_module("moe_kernels")
        return
    if part == "warm" and not dry:
        gpu_jobs.wait_for_the_library()
    from gpu_device import Gpu, Rehearsal

    device = Rehearsal() if dry else Gpu()
    torch.manual_seed(0)
    function = getattr(importlib.import_module(PARTS[part]), part.replace(" ", "_"))
    with device.prepared(part, tool):
        function(device, Report(path), which, tool)


def rehearse(job: Job, seconds: float, path: Path) -> str:
    """Runs a job in this process, except those under a sanitizer, which g++'s sanitizers stand in for."""
    if job.tool:
        return gpu_jobs.run([*job.command(path), "--dry-run"], gpu_jobs.environment(), seconds)
    try:
        work(job.part, job.which, job.tool, path, dry=True)
    except Exception:
        return traceback.format_exc()
    return ""


def versions() -> dict[str, str]:
    def said(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
        except OSError:
            return ""

    nvcc = re.search(r"release (\S+),", said("nvcc", "--version"))
    return {
        "commit": said("git", "rev-parse", "--short", "HEAD") or "unknown",
        "changed": said("git", "status", "--porcelain", "--untracked-files=no"),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__,
        "cuda": torch.version.cuda or "none",
        "nvcc": nvcc.group(1) if nvcc else "none",
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def perform(dry: bool, results: Path | None, limit: float) -> int:
    """Runs everything; returns the exit status."""
    start, facts = time.perf_counter(), versions()
    device = "rehearsal on the CPU" if dry else torch.cuda.get_device_name()
    folder = results or ROOT / "benchmarks/results" / re.sub(r"\W+", "-", device.lower())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub(r'[^0-9-]+', '-', facts['date'])}-{facts['commit']}.jsonl"
    report = Report(path)
    plan = gpu_jobs.rehearsed(gpu_jobs.STAGES) if dry else gpu_jobs.STAGES
    names = [str(job) for stage in plan for job in stage.jobs]
    report.add(kind="begin", device=device, gpus=0 if dry else torch.cuda.device_count(), versions=facts, plan=names)
    print(f"{device}; results in {path}", flush=True)
    if not dry and torch.cuda.device_count() > 1:
        print(f"{torch.cuda.device_count()} GPUs; all checks but one use cuda:0", flush=True)
    signal.signal(signal.SIGTERM, gpu_jobs.stop_all)
    signal.signal(signal.SIGINT, gpu_jobs.stop_all)
    if dry:
        runner = gpu_jobs.Runner(report, start + limit, partial(rehearse, path=path))
    else:
        capability = torch.cuda.get_device_capability()
        runner = gpu_jobs.Runner(report, start + limit, partial(gpu_jobs.on_gpu, report=report, capability=capability))
    runner.run_all(plan)
    found = summary(report.entries()) | {"seconds": round(time.perf_counter() - start, 1)}
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found), f"{found['seconds']} s; {path.with_suffix('.json')}", sep="\n")
    return 1 if found["checks"]["failed"] or found["cut_off"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="folder for results (default: benchmarks/results/<device>)"
    )
    parser.add_argument("--seconds", type=float, help="time limit for everything")
    parser.add_argument(
        "--summary", type=Path, metavar="FILE", help="print what a file of results holds, and run nothing"
    )
    parser.add_argument("--part", choices=PARTS, help="run only this part, in this process (as a job does)")
    parser.add_argument("--which", default="")
    parser.add_argument("--tool", default="")
    parser.add_argument("--into", type=Path)
    options = parser.parse_args()
    if options.summary is not None:
        print(table(summary(Report(options.summary).entries())))
        return 0
    if options.part is not None:
        work(options.part, options.which, options.tool, options.into, options.dry_run)
        return 0
    if options.dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            return perform(True, options.results or Path(scratch), options.seconds or 3600)
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} must see a GPU, got none; --dry-run rehearses on the CPU")
    return perform(False, options.results, options.seconds or gpu_jobs.LIMIT)


if __name__ == "__main__":
    sys.exit(main())
