"""The jobs of `make gpu`, in their order: each a process of its own with a time limit, and none takes another down."""

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
LIMIT = 360.0  # seconds, of a machine that is held for 15 minutes at most, its start included
SECTIONS = ("RT-ER step", "attack step", "grouped GEMMs", "convolutions", "layer", "passes")
SANITIZERS = ("memcheck", "racecheck")
SHARES = 8  # processes that divide what consists of many small pieces


@dataclass(frozen=True)
class Job:
    """A part of the work, or of it a section, a shard ("3/8") or what a tool of compute-sanitizer sees."""

    part: str
    seconds: float
    which: str = ""
    tool: str = ""
    essential: bool = False  # nothing is worth doing where it fails
    proves: bool = True  # where it fails, something is wrong, and not merely unknown

    def __str__(self) -> str:
        return " ".join(filter(None, (self.part, self.which, self.tool and f"under {self.tool}")))

    def command(self, path: Path) -> list[str]:
        words = ["--part", self.part, "--which", self.which, "--tool", self.tool, "--into", str(path)]
        return [sys.executable, str(SCRIPT), *words]


class Stage(NamedTuple):
    """Jobs that run together, so many at a time. Stages follow one another, the most telling first."""

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
    """The plan for the CPU, in no hurry: one job at a time, and of those that are alike one, the cases all in one."""
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
    """Runs jobs until the deadline into one report; `perform` says how a job ended: "" or why it failed."""

    def __init__(self, report: Report, deadline: float, perform: Callable[[Job, float], str]) -> None:
        self.report, self.deadline, self.perform = report, deadline, perform

    def run(self, job: Job) -> bool:
        """Whether the job succeeded; one for which no time is left does not begin."""
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
    """Ends every job that runs, and lets none begin."""
    stopped.set()
    for process in tuple(_running):
        _kill(process)


def _kill(process: "subprocess.Popen[str]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with its children: a sanitizer's target, a test's workers


def run(command: Sequence[str], environment: dict[str, str], seconds: float) -> str:
    """Runs a command; "" if it succeeded, else why not, with the end of what it wrote."""
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
    """The one to build for, as TORCH_CUDA_ARCH_LIST names it; sm_90's own instructions need sm_90a."""
    return f"{capability[0]}.{capability[1]}" + "a" * (capability == (9, 0))


def environment(capability: tuple[int, int] | None = None) -> dict[str, str]:
    """What jobs find: this work tree, built in place, and for the build the architecture of the device alone."""
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if capability is not None:
        variables |= {"MOE_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture(capability)}
    return variables


def sanitizer(tool: str) -> list[str]:
    """The command line before that of a program. It looks at our kernels alone, not at torch's calls of the API."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    options = ["--tool", tool, "--kernel-name", "kns=moe", "--report-api-errors", "no", "--error-exitcode", "3"]
    return [program, *options]


def on_gpu(job: Job, seconds: float, report: Report, capability: tuple[int, int]) -> str:
    """Runs a job's process. What compute-sanitizer is to look at is skipped, and said to be, where it cannot."""
    if job.part == "build":
        return run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], environment(capability), seconds)
    command = job.command(report.path)
    if not job.tool:
        return run(command, environment(), seconds)
    if reason := why_no_sanitizer():
        report.add(kind="skipped", name=str(job), reason=reason)
        return ""
    without_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or a write past an array stays within the cache
    return run([*sanitizer(job.tool), *command], environment() | without_cache, seconds)


_probe = threading.Lock()
_probed: list[str] = []


def why_no_sanitizer() -> str:
    """ "" where compute-sanitizer can look at a program, which on some virtual machines it cannot; asked once."""
    with _probe:
        if not _probed:
            program = "import torch; torch.zeros(8, device='cuda').sum().item()"
            _probed.append(run([*sanitizer("memcheck"), sys.executable, "-c", program], environment(), 60))
    return _probed[0]


def wait_for_the_library(seconds: float = 150) -> None:
    """Until the CPU library is there, beside whose CUDA part Triton's kernels are compiled."""
    end = time.monotonic() + seconds
    while subprocess.run([sys.executable, "-c", "from moe_kernels import _C"], capture_output=True).returncode:
        if time.monotonic() > end:
            raise TimeoutError(f"moe_kernels._C was not there after {seconds:.0f} s")
        time.sleep(0.5)
