"""Where `make gpu` runs: on a GPU, or rehearsed on the CPU by the nearest thing that one has."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from roofline import TARGETS, Conv, Layer, Linear, Shapes
from torch import Tensor

from moe_kernels import _library, testing
from moe_kernels.testing.host_sync import HostSyncs

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks/gpu.py"

Outputs = tuple[Tensor, ...]


def first_cases() -> list[testing.Case]:
    """One case of every operator."""
    return list({c.op: c for c in reversed(testing.CASES) if "no_rows" not in c.name}.values())


def cuda_operators() -> frozenset[str]:
    """The operators with cases that CUDA C++ computes."""
    registered = {op for path in ROOT.glob("csrc/cuda/*.cu") for op in re.findall(r'impl\("(\w+)"', path.read_text())}
    return frozenset(c.op for c in testing.CASES if {c.op, f"{c.op}_forward"} & registered)


class Gpu:
    """A CUDA device. Every job has a process of its own, so that a fault or a hang ends that job alone."""

    name = "cuda"
    dry = False
    shards = 8  # processes that share the cases, since most of their time goes into compiling Triton kernels
    sanitizers = ("memcheck", "racecheck", "initcheck")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    compiler = "inductor"
    cases = testing.CASES
    sanitized = cuda_operators()
    pytest_options: tuple[str, ...] = ()
    shapes: Shapes = TARGETS
    layer = (64, 128, 8, 512)  # width, hidden, experts, rows of the layer that is captured
    attack = (16, 32, 32, 10)  # width of the ResNet-18, size and number of the images, steps

    @staticmethod
    def label() -> str:
        return torch.cuda.get_device_name()

    @contextmanager
    def prepared(self, part: str, tool: str | None) -> Iterator[None]:
        """The state in which a part of the work runs."""
        torch.backends.cudnn.benchmark = part == "speed"
        if part != "speed":  # the reference is to be exact in its dtype
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        yield

    def run(self, command: Sequence[str], tool: str | None, seconds: float, work: Callable[[], None]) -> str:
        """Runs a job by its command line, and says how it failed, if it did."""
        environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        prefix: list[str] = []
        if tool is not None:
            program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
            prefix = [program, "--tool", tool, "--kernel-regex", "kns=moe", "--error-exitcode", "3"]
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # or a write past an array stays within the cache
        return run([*prefix, *command], environment, seconds)

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Another stream than the default, busy for a moment: what is sent past it comes too early and shows."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)  # cycles
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self, function: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        """The outputs of a function that always works on the same tensors, and what computes them anew: a graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function()
        return outputs, graph.replay

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, it is an error if the host waits for the device."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def milliseconds(self, function: Callable[[], object], budget: int = 100) -> float:
        """Median over as many runs as fit in `budget` milliseconds, each with a cold cache."""
        from triton.testing import do_bench

        return float(do_bench(function, warmup=25, rep=budget, return_mode="median"))


class Rehearsal:
    """The CPU in a GPU's place: Triton's interpreter, a CUDA kernel under emulation with g++'s sanitizers instead of
    compute-sanitizer, a second run instead of a graph's replay, and tiny sizes."""

    name = "cpu"
    dry = True
    shards = 1
    sanitizers = ("memcheck",)
    dtypes = (torch.float32,)
    compiler = "aot_eager"
    cases = first_cases()
    sanitized = frozenset(op for op in cuda_operators() if "pgd_step" not in op)  # whose emulation is not in place
    pytest_options = ("-k", "test_hidden_grad and relu2 and float32")
    shapes = Shapes(
        linear=(Linear(32, 16, 16, 2),),
        layer=Layer(8, 16, 16, 4, 2),
        conv=(Conv(2, 2, 3, 4, 4),),
        images=(2, 3, 4, 4),
        activations=(2, 4, 4, 4),
        logits=(2, 4),
        rt_er=(2, 2, 2),
    )
    layer = (16, 16, 4, 8)
    attack = (2, 8, 2, 2)

    @staticmethod
    def label() -> str:
        return "rehearsal on the CPU"

    def __init__(self) -> None:
        self._alone = threading.Lock()

    @contextmanager
    def prepared(self, part: str, tool: str | None) -> Iterator[None]:
        """In the cases, the operators run on CPU tensors what a GPU would run; for networks that would take minutes."""
        kernels: dict[str, Callable[..., object]] = {}
        if tool is not None:
            sys.path.insert(0, str(ROOT / "tests"))
            from simt import emulate

            kernels = {op: getattr(emulate, op) for op in emulate.__all__}
        elif part == "cases":
            kernels = {op: partial(_library.run_triton, file, op) for op, file in _library.TRITON.items()}
        with warnings.catch_warnings(), torch.library._scoped_library("moe_kernels", "IMPL") as library:
            warnings.simplefilter("ignore", UserWarning)  # that kernels are overridden
            for op, kernel in kernels.items():
                library.impl(op, kernel, "CPU", allow_override=True)
            yield

    def run(self, command: Sequence[str], tool: str | None, seconds: float, work: Callable[[], None]) -> str:
        if tool is not None:
            return run([*command, "--dry-run"], dict(os.environ), seconds)
        with self._alone:
            work()
        return ""

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        yield

    def capture(self, function: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        outputs = function()

        def replay() -> None:
            for old, new in zip(outputs, function(), strict=True):
                old.detach().copy_(new)

        return outputs, replay

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        with HostSyncs() as syncs:
            yield
        if syncs.calls:
            raise RuntimeError(f"the host would wait in {', '.join(syncs.calls)}")

    def milliseconds(self, function: Callable[[], object], budget: int = 100) -> float:
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3


Device = Gpu | Rehearsal


def run(command: Sequence[str], environment: dict[str, str], seconds: float) -> str:
    """Runs a command; "" if it succeeded, else why not, with the end of what it wrote."""
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        return str(error)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with its children: a sanitizer's target, a test's workers
        process.communicate()
        return f"did not finish within {seconds:.0f} s"
    return f"ended with status {process.returncode}: {output[-2000:]}" if process.returncode else ""
