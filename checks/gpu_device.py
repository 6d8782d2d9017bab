"""Where `make gpu` runs: on a GPU, or in a rehearsal on the CPU, with the closest substitutes there are."""

import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from gpu_jobs import ROOT
from roofline import TARGETS, Conv, Layer, Linear, Shapes
from torch import Tensor

from moe_kernels import _library, testing
from moe_kernels.testing.host_sync import HostSyncs

Outputs = tuple[Tensor, ...]


def cuda_operators() -> frozenset[str]:
    """The operators that are written in CUDA C++."""
    return frozenset(
        op for path in ROOT.glob("csrc/cuda/*.cu") for op in re.findall(r'impl\("(\w+)"', path.read_text())
    )


def on_gpu(op: str, operators: frozenset[str]) -> bool:
    """Whether an operator has a kernel on a GPU: in CUDA C++ (`operators`), in Triton, or composed of others."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(
        n in operators or has(f"moe_kernels::{n}", "CUDA") for n in (op, f"{op}_forward") if n in _library.OPERATORS
    )


CUDA = cuda_operators()
CASES = [c for c in testing.CASES if on_gpu(c.op, CUDA)]


def first_cases() -> list[testing.Case]:
    """One case of every operator that a GPU has."""
    return list({c.op: c for c in reversed(CASES) if "no_rows" not in c.name}.values())


class Gpu:
    """A CUDA device."""

    name = "cuda"
    dry = False
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    compiler = "inductor"
    cases = CASES
    sanitized = frozenset(c.op for c in CASES if {c.op, f"{c.op}_forward"} & CUDA)
    pytest_options: tuple[str, ...] = ()
    shapes: Shapes = TARGETS
    layer = (64, 128, 8, 512)  # width, hidden, experts, rows of the layer that is captured
    attack = (16, 32, 32, 10)  # width of the ResNet-18, size and number of the images, steps

    @contextmanager
    def prepared(self, part: str, tool: str) -> Iterator[None]:
        """The state in which a part of the work runs."""
        timed = part in ("speed", "tuned")
        torch.backends.cudnn.benchmark = timed
        if not timed:  # the reference must not round more than its dtype
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        yield

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """A non-default stream that is busy for a moment, so that work sent to another stream by mistake runs too early
        and shows."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)  # cycles
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self, function: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        """The outputs of a function that always works on the same tensors, and a graph's replay, which recomputes
        them."""
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
    """The CPU in place of a GPU, at tiny sizes: Triton's interpreter, emulated CUDA kernels under g++'s sanitizers
    instead of compute-sanitizer, a second run instead of a graph's replay."""

    name = "cpu"
    dry = True
    dtypes = (torch.float32,)
    compiler = "aot_eager"
    cases = first_cases()
    sanitized = frozenset(op for op in Gpu.sanitized if "pgd_step" not in op)  # its emulation does not work in place
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

    @contextmanager
    def prepared(self, part: str, tool: str) -> Iterator[None]:
        """Makes operators run on CPU tensors what a GPU would run, in the cases only: networks would take minutes."""
        kernels: dict[str, Callable[..., object]] = {}
        if tool:
            sys.path.insert(0, str(ROOT / "tests"))
            from simt import emulate

            kernels = {op: getattr(emulate, op) for op in emulate.__all__}
        elif part in ("warm", "smoke", "cases"):
            kernels = {op: partial(_library.run_triton, file, op) for op, file in _library.TRITON.items()}
        with warnings.catch_warnings(), torch.library._scoped_library("moe_kernels", "IMPL") as library:
            warnings.simplefilter("ignore", UserWarning)  # torch warns that kernels are overridden
            for op, kernel in kernels.items():
                library.impl(op, kernel, "CPU", allow_override=True)
            yield

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
