"""The jobs of `make gpu` in order; each is a process of its own with a time limit, so that none takes another down."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from gpu_report import Report

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "checks/gpu.py"
LIMIT = 360.0  # seconds; fits a machine that is rented for 15 minutes, its start included
SECTIONS = ("RT-ER step", "attack step", "grouped GEMMs", "convolutions", "layer", "passes")
SANITIZERS = ("memcheck", "racecheck")
SHARES = 8  # processes that share work of many small pieces


@dataclass(frozen=True)
class Job:
    """A part of the work, or a section or a shard ("3/8") of it; under a tool of compute-sanitizer if one is named."""

    part: str
    seconds: float
    which: str = ""
    tool: str = ""
    essential: bool = False  # if it fails, nothing else is worth doing
    proves: bool = True  # if it fails, something is wrong, not merely unknown

    def __str__(self) -> str:
        return " ".join(filter(None, (self.part, self.which, self.tool and f"under {self.tool}")))

    def command(self, path: Path) -> list[str]:
        words = ["--part", self.part, "--which", self.which, "--tool", self.tool, "--into", str(path)]
        return [sys.executable, str(SCRIPT), *words]


class Stage(NamedTuple):
    """Jobs that run together, at most `at_a_time`. Stages run one after the other, the most informative first."""

    jobs: list[Job]
    at_a_time: int


def shared(part: str, seconds: float, proves: bool = True) -> list[Job]:
    return [Job(part, seconds, f"{i}/{SHARES}", proves=proves) for i in range(SHARES)]


STAGES = (
    Stage([Job("build", 150, essential=True), *shared("warm", 150, proves=False)], 1 + SHARES),
    Stage([Job("smoke", 60, essential=True)], 1),
    Stage([Job("speed", 45, section, proves=False) for section in SECTIONS], 1),
    Stage([*(Job(part, 90) for part in ("graphs", "first act", "syncs")), *shared("cases", 120)], 3 + SHARES),
    Stage(
        [Job("kernel tests", 150), *(Job("cases", 150, tool=tool) for tool in SANITIZERS), Job("compilation", 120)],
        2 + len(SANITIZERS),
    ),
    Stage([Job("tuned", 60, proves=False)], 1),
)


def rehearsed(plan: Sequence[Stage]) -> list[Stage]:
    """The plan for the CPU: one job at a time with ample time, one of each kind of shard, all cases in one job."""
    return [
        Stage(
            [
                replace(job, which="" if job.part == "cases" else job.which, seconds=600)
                for job in stage.jobs
                if "/" not in job.which or job.which.startswith("0/")
                if job.tool in ("", "memcheck")
            ],
            1,
        )
        for stage in plan
    ]


class Runner:
    """Runs jobs until the deadline and reports them; `perform` returns "" if a job succeeded, else why it failed."""

    def __init__(self, report: Report, deadline: float, perform: Callable[[Job, float], str]) -> None:
        self.report, self.deadline, self.perform = report, deadline, perform

    def run(self, job: Job) -> bool:
        """Runs a job, unless no time is left; returns whether it succeeded."""
        start = time.perf_counter()
        seconds = min(job.seconds, self.deadline - start)
        begins = seconds > 1 and not stopped.is_set()
        error = self.perform(job, seconds) if begins else "there was no time left"
        end = time.perf_counter()
        cut_off = bool(error) and (end >= self.deadline or stopped.is_set() or not begins)
        self.report.add(
            kind="job",
            name=str(job),
            ok=not error,
            proves=job.proves,
            cut_off=cut_off,
            seconds=round(end - start, 1),
            error=error,
        )
        print(f"{job!s:28}{end - start:7.1f} s  {'cut off' if cut_off else 'failed' if error else ''}", flush=True)
        return not error

    def run_all(self, plan: Sequence[Stage]) -> None:
        for stage in plan:
            with ThreadPoolExecutor(stage.at_a_time) as pool:
                succeeded = dict(zip(stage.jobs, pool.map(self.run, stage.jobs), strict=True))
            if any(job.essential and not succeeded[job] for job in stage.jobs):
                return


stopped = threading.Event()
_running: set[subprocess.Popen[str]] = set()


def stop_all(*_: object) -> None:
    """Kills every running job, and lets no other begin."""
    stopped.set()
    for process in tuple(_running):
        _kill(process)


def _kill(process: "subprocess.Popen[str]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with its children: a sanitizer's target, a test's workers


def run(command: Sequence[str], environment: dict[str, str], seconds: float) -> str:
    """Runs a command; returns "" if it succeeded, else why not, with the end of its output."""
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        return str(error)
    _running.add(process)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _kill(process)
        output, _ = process.communicate()
        return f"did not finish within {seconds:.0f} s: {output[-500:]}"
    finally:
        _running.discard(process)
    return f"ended with status {process.returncode}: {output[-2000:]}" if process.returncode else ""


def architecture(capability: tuple[int, int]) -> str:
    """The architecture to build for, as in TORCH_CUDA_ARCH_LIST; instructions specific to sm_90 need sm_90a."""
    return f"{capability[0]}.{capability[1]}" + "a" * (capability == (9, 0))


def environment(capability: tuple[int, int] | None = None) -> dict[str, str]:
    """The environment of jobs: this work tree, built in place; for the build, only the device's architecture."""
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if capability is not None:
        variables |= {"MOE_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture(capability)}
    return variables


def sanitizer(tool: str) -> list[str]:
    """compute-sanitizer's part of the command line. It checks our kernels alone, not torch's calls of the CUDA API."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    options = ["--tool", tool, "--kernel-name", "kns=moe", "--report-api-errors", "no", "--error-exitcode", "3"]
    return [program, *options]


def on_gpu(job: Job, seconds: float, report: Report, capability: tuple[int, int]) -> str:
    """Runs a job's process. Jobs for compute-sanitizer are skipped, and reported as such, if it does not work here."""
    if job.part == "build":
        return run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], environment(capability), seconds)
    command = job.command(report.path)
    if not job.tool:
        return run(command, environment(), seconds)
    if reason := why_no_sanitizer():
        report.add(kind="skipped", name=str(job), reason=reason)
        return ""
    without_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else a write past an array may stay inside the cache
    return run([*sanitizer(job.tool), *command], environment() | without_cache, seconds)


_probe = threading.Lock()
_probed: list[str] = []


def why_no_sanitizer() -> str:
    """ "" if compute-sanitizer works here, else why not, as on some virtual machines; tried once."""
    with _probe:
        if not _probed:
            program = "import torch; torch.zeros(8, device='cuda').sum().item()"
            _probed.append(run([*sanitizer("memcheck"), sys.executable, "-c", program], environment(), 60))
    return _probed[0]


def wait_for_the_library(seconds: float = 150) -> None:
    """Waits for the CPU library, which compiling Triton's kernels needs; the CUDA library is built meanwhile."""
    end = time.monotonic() + seconds
    while subprocess.run([sys.executable, "-c", "from moe_kernels import _C"], capture_output=True).returncode:
        if time.monotonic() > end:
            raise TimeoutError(f"moe_kernels._C was not there after {seconds:.0f} s")
        time.sleep(0.5)
