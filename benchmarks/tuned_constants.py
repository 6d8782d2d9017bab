"""Times the CPU kernels with other values of their tuned constants; comments in csrc/ cite its results.

    python benchmarks/tuned_constants.py              # as Markdown; minutes to compile, half a minute to time
    python benchmarks/tuned_constants.py --compile    # only compile, into build/
    python benchmarks/tuned_constants.py --match kKc  # only some

Each kernel is compiled with each value, for the level of this CPU, into a library and a namespace of its own. Then the
values take turns in one process; a figure is the median, over the rounds, of a value's time over the shipped one's.
"""

import argparse
import hashlib
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_kernels import _library

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/tuned_constants"
TORCH = Path(torch.__file__).parent
OLDEST_TORCH = re.findall(r"torch>=(\d+)\.(\d+)", (ROOT / "pyproject.toml").read_text())[0]
STABLE_ABI = "0x{:02x}{:02x}000000000000".format(*map(int, OLDEST_TORCH))
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-w"]  # as in setup.py
SECONDS = 0.6  # of timing, for each constant


@dataclass(frozen=True)
class Tuned:
    """A constant in a file of csrc/, a kernel (csrc/cpu/<kernel>.cpp) that shows it, and values to try."""

    name: str
    file: str
    kernel: str
    others: tuple[str, ...]
    shape: str
    call: Callable[[object], object]  # of the operators of one namespace

    def value(self) -> str:
        return self._declaration()[2]

    def source(self, value: str) -> str:
        """The text of the file with another value."""
        found = self._declaration()
        return found.string[: found.start(2)] + value + found.string[found.end(2) :]

    def _declaration(self) -> re.Match[str]:
        text = (ROOT / "csrc" / self.file).read_text()
        found = re.search(rf"(constexpr int64_t {self.name} = )([^;]+);", text)
        if found is None:
            sys.exit(f"{self.name} is not in csrc/{self.file}")
        return found


def sorted_rows(rows: int, experts: int) -> Tensor:
    return torch.arange(experts + 1, dtype=torch.int32) * (rows // experts)


def linear(rows: int, n_in: int, n_out: int, experts: int, transposed: bool = False) -> Callable[[object], object]:
    x, weight, offsets = torch.randn(rows, n_in), torch.randn(experts, n_out, n_in), sorted_rows(rows, experts)
    if transposed:
        weight = weight.mT.contiguous().mT
    return lambda ops: ops.expert_linear(x, weight, None, offsets, None)


def linear_weight_grad(rows: int, n_in: int, n_out: int, experts: int) -> Callable[[object], object]:
    grad, x, offsets = torch.randn(rows, n_out), torch.randn(rows, n_in), sorted_rows(rows, experts)
    return lambda ops: ops.expert_linear_weight_grad(grad, x, offsets, None)


def winograd(images: int, channels: int, size: int, experts: int) -> Callable[[object], object]:
    x = torch.randn(images, channels, size, size).to(memory_format=torch.channels_last)
    weight, offsets = torch.randn(experts, channels, channels, 3, 3), sorted_rows(images, experts)
    return lambda ops: ops.winograd_conv2d(x, weight, None, offsets, [1, 1], False)


def winograd_weight_grad(images: int, channels: int, size: int, experts: int) -> Callable[[object], object]:
    x = torch.randn(images, channels, size, size).to(memory_format=torch.channels_last) / 8
    offsets = sorted_rows(images, experts)
    return lambda ops: ops.winograd_conv2d_weight_grad(x, x, offsets, [1, 1])


def combine(rows: int, k: int, width: int) -> Callable[[object], object]:
    y, weights = torch.randn(rows * k, width), torch.rand(rows, k)
    position = torch.randperm(rows * k, dtype=torch.int32).view(rows, k)
    return lambda ops: ops.combine(y, weights, position)


def combine_weight_grad(rows: int, k: int, width: int) -> Callable[[object], object]:
    y, grad = torch.randn(rows * k, width), torch.randn(rows, width)
    position = torch.randperm(rows * k, dtype=torch.int32).view(rows, k)
    return lambda ops: ops.combine_weight_grad(grad, y, position)


def expert_sum(rows: int, width: int, experts: int) -> Callable[[object], object]:
    x, offsets = torch.randn(rows, width), sorted_rows(rows, experts)
    return lambda ops: ops.expert_sum(x, offsets)


def batch_norm(channels_last: bool, training: bool) -> Callable[[object], object]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, table = torch.randn(32, 128, 16, 16).to(memory_format=layout), torch.rand(4, 128)
    offsets = sorted_rows(32, 4)
    return lambda ops: ops.expert_batch_norm_forward(x, table, table, table, table, offsets, training, 1e-5)


def hidden_grad(rows: int, n: int) -> Callable[[object], object]:
    da, z, gates = torch.randn(rows, n), torch.randn(rows, n), torch.rand(rows)
    return lambda ops: ops.expert_mlp_hidden_grad(da, z, gates, "gelu", True, True, True)


def group_by_expert(slots: int, experts: int) -> Callable[[object], object]:
    ids = torch.randint(experts, (slots,), dtype=torch.int32)
    return lambda ops: ops.group_by_expert(ids, experts)


def kl_divergence(rows: int, classes: int) -> Callable[[object], object]:
    clean, adv = torch.randn(rows, classes), torch.randn(rows, classes)
    return lambda ops: ops.kl_divergence(clean, adv)


def mask_relu(*shape: int) -> Callable[[object], object]:
    x = torch.randn(shape)
    return lambda ops: ops.mask_relu_forward(x)


def pgd_step(*shape: int) -> Callable[[object], object]:
    x, grad, step = torch.rand(shape), torch.randn(shape), torch.tensor([0.01])
    x_adv = x.clone()
    return lambda ops: ops.pgd_step_(x_adv, grad, x, step, step, "Linf", [0.0, 1.0])


def table() -> list[Tuned]:
    always_ours, always_vendor = "0", "1 << 30"
    eight = "2048 x 512 x 1024, 8 experts"
    square, deep = linear(2048, 512, 1024, 2), linear(2048, 1024, 1024, 8)
    square_grad = linear_weight_grad(2048, 512, 1024, 8)
    rows = [
        Tuned("kGemmRows", "cpu/blocks.h", "expert_linear", ("128", "512"), "2048 x 512 x 1024, 2 experts", square),
        Tuned("kWeightGradRows", "cpu/blocks.h", "expert_linear", ("256", "1024"), f"{eight}, dW", square_grad),
        Tuned("kKc", "cpu/gemm.h", "expert_linear", ("256", "1024"), "2048 x 1024 x 1024, 8 experts", deep),
        Tuned(
            "kNc",
            "cpu/gemm.h",
            "expert_linear",
            ("kNr", "2 * kNr", "8 * kNr"),
            "4 rows of each of 64 experts, 512 x 1024, weight transposed",
            linear(256, 1024, 512, 64, transposed=True),
        ),
        Tuned("kPackedColumns", "cpu/gemm.h", "expert_linear", ("1", "4", "16", "32"), f"{eight}, dW", square_grad),
        Tuned("kAhead", "cpu/gemm.h", "expert_linear", ("0", "4", "16"), f"{eight}, dW", square_grad),
    ]
    for few in (1, 2, 3, 4):
        shape = f"{few} rows of each of 64 experts, 512 x 512"
        call = linear(64 * few, 512, 512, 64)
        rows.append(Tuned("kFewRows", "cpu/gemm.h", "expert_linear", (always_ours, always_vendor), shape, call))
    conv = winograd(32, 128, 16, 4)
    return [
        *rows,
        Tuned("kTiles", "cpu/winograd.h", "winograd_conv2d", ("96", "384"), "32 images of 128 x 16 x 16", conv),
        Tuned("kSummands", "cpu/winograd.h", "winograd_conv2d", ("32", "128"), "the same", conv),
        Tuned("kFilters", "cpu/winograd_conv2d.cpp", "winograd_conv2d", ("64", "128"), "the same", conv),
        Tuned(
            "kRowGroup",
            "cpu/winograd_conv2d_weight_grad.cpp",
            "winograd_conv2d_weight_grad",
            ("8 * kMr",),
            "the same",
            winograd_weight_grad(32, 128, 16, 4),
        ),
        Tuned(
            "kMostParts",
            "cpu/winograd_conv2d_weight_grad.cpp",
            "winograd_conv2d_weight_grad",
            ("4", "64"),
            "128 images of 32 x 16 x 16",
            winograd_weight_grad(128, 32, 16, 1),
        ),
        Tuned(
            "kMostSums",
            "cpu/winograd_conv2d_weight_grad.cpp",
            "winograd_conv2d_weight_grad",
            ("1 << 18", "4 << 20"),
            "32 images of 128 x 16 x 16, 1 expert",
            winograd_weight_grad(32, 128, 16, 1),
        ),
        Tuned("kTaskWork", "common/tensor.h", "combine", ("4096", "262144"), "256 x 2 x 256", combine(256, 2, 256)),
        Tuned("kColumns", "cpu/combine.cpp", "combine", ("64", "1024"), "1024 x 2 x 1024", combine(1024, 2, 1024)),
        Tuned("kSummands", "cpu/combine.cpp", "combine", ("16", "256"), "the same", combine_weight_grad(1024, 2, 1024)),
        Tuned("kColumns", "cpu/expert_sum.cpp", "expert_sum", ("64", "1024"), "2048 x 1024", expert_sum(2048, 1024, 8)),
        Tuned("kRows", "cpu/expert_sum.cpp", "expert_sum", ("4", "64"), "the same", expert_sum(2048, 1024, 8)),
        Tuned(
            "kChannels",
            "cpu/expert_batch_norm.cpp",
            "expert_batch_norm",
            ("32", "128"),
            "32 x 128 x 16 x 16, channels-last, training",
            batch_norm(True, True),
        ),
        Tuned(
            "kSummands",
            "cpu/expert_batch_norm.cpp",
            "expert_batch_norm",
            ("4", "64"),
            "the same",
            batch_norm(True, True),
        ),
        Tuned(
            "kPixels",
            "cpu/expert_batch_norm.cpp",
            "expert_batch_norm",
            ("256", "4096"),
            "the same",
            batch_norm(True, True),
        ),
        Tuned(
            "kSums",
            "cpu/expert_batch_norm.cpp",
            "expert_batch_norm",
            ("32", "128"),
            "the same",
            batch_norm(True, True),
        ),
        Tuned(
            "kGrain",
            "cpu/expert_batch_norm.cpp",
            "expert_batch_norm",
            ("2048", "131072"),
            "the same, contiguous, evaluation",
            batch_norm(False, False),
        ),
        Tuned("kSums", "cpu/expert_mlp.cpp", "expert_mlp", ("16", "256"), "512 x 1024, gelu", hidden_grad(512, 1024)),
        Tuned(
            "kSlots",
            "cpu/group_by_expert.cpp",
            "group_by_expert",
            ("1024", "16384"),
            "16384 slots, 8 experts",
            group_by_expert(16384, 8),
        ),
        Tuned(
            "kGrain", "cpu/kl_divergence.cpp", "kl_divergence", ("512", "32768"), "256 x 100", kl_divergence(256, 100)
        ),
        Tuned(
            "kBlock", "cpu/mask_relu.cpp", "mask_relu", ("512", "8192"), "32 x 64 x 16 x 16", mask_relu(32, 64, 16, 16)
        ),
        Tuned("kGrain", "cpu/mask_relu.cpp", "mask_relu", ("2", "128"), "the same", mask_relu(32, 64, 16, 16)),
        Tuned(
            "kGrain",
            "cpu/pgd_step_.cpp",
            "pgd_step_",
            ("1 << 12", "1 << 18"),
            "32 x 3 x 32 x 32",
            pgd_step(32, 3, 32, 32),
        ),
    ]


def library(tuned: Tuned, value: str) -> tuple[Path, str, Callable[[], None]]:
    """The library of a kernel with one value of a constant, its operators' namespace, and what compiles it."""
    edited = {} if value == tuned.value() else {tuned.file: tuned.source(value)}
    kernel = f"cpu/{tuned.kernel}.cpp"
    march = f"-march={_library.level}" if _library.level.startswith("x86") else ""
    flags = [*FLAGS, *filter(None, [march]), f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-isystem", str(TORCH / "include")]
    texts = [p.read_text() for p in sorted((ROOT / "csrc").glob("c[op]*/*"))] + [*edited.values()]
    content = re.sub(r"//.*", "", "".join(texts)) + kernel
    namespace = "tuned_" + hashlib.sha256((content + repr(flags)).encode()).hexdigest()[:16]
    file = BUILD / f"{namespace}.so"

    def compile_it() -> None:
        if file.exists():
            return
        folder = BUILD / namespace
        for path in (tuned.file, kernel):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            text = edited.get(path) or (ROOT / "csrc" / path).read_text()
            (folder / path).write_text(text.replace("LIBRARY_IMPL(moe_kernels,", f"LIBRARY_IMPL({namespace},"))
        include = [f"-I{folder}", f"-I{ROOT / 'csrc'}"]
        unfinished = file.with_suffix(".unfinished")
        command = [
            os.environ.get("CXX", "g++"),
            *flags,
            *include,
            "-shared",
            str(folder / kernel),
            "-o",
            str(unfinished),
        ]
        subprocess.run([*command, f"-L{TORCH / 'lib'}", "-ltorch_cpu"], check=True)
        unfinished.rename(file)

    return file, namespace, compile_it


LOADED: dict[str, torch.library.Library] = {}  # the definitions of each namespace, which live as long as they are kept


def operators(tuned: Tuned, file: Path, namespace: str) -> object:
    """The operators of a compiled library, defined like ours."""
    if namespace not in LOADED:
        LOADED[namespace] = torch.library.Library(namespace, "DEF")
        for name in re.findall(r'm\.impl\("(\w+)"', (ROOT / f"csrc/cpu/{tuned.kernel}.cpp").read_text()):
            schema = str(getattr(torch.ops.moe_kernels, name).default._schema)
            LOADED[namespace].define(schema.removeprefix("moe_kernels::"))
        torch.ops.load_library(file)
    return getattr(torch.ops, namespace)


def ratios(call: Callable[[object], object], contenders: list[object], seconds: float) -> tuple[float, list[float]]:
    """Milliseconds of the first contender, and the others' times over its, in turns, once their results agree."""
    expected = call(contenders[0])
    for ops in contenders[1:]:
        if expected is not None:  # else it works in place
            torch.testing.assert_close(call(ops), expected, rtol=1e-3, atol=1e-3)
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 5 or time.perf_counter() < end:
        taken = []
        for ops in contenders:
            call(ops)  # into the caches
            start = time.perf_counter()
            call(ops)
            taken.append(time.perf_counter() - start)
        rounds.append(taken)
    first = statistics.median(r[0] for r in rounds) * 1e3
    return first, [statistics.median(r[i] / r[0] for r in rounds) for i in range(1, len(contenders))]


def gain(call: Callable[[object], object], ops: object, seconds: float) -> float:
    """The time of one thread over that of all, in turns."""
    threads = torch.get_num_threads()

    def on(count: object) -> object:
        torch.set_num_threads(count)  # type: ignore[arg-type]
        return call(ops)

    try:
        return ratios(on, [threads, 1], seconds)[1][0]
    finally:
        torch.set_num_threads(threads)


def cpu() -> str:
    """Its name, where the system tells."""
    facts = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", facts.read_text()) if facts.exists() else None
    return found[1] if found else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--match", default="", help="only constants in whose file and name this regular expression is found"
    )
    parser.add_argument("--compile", action="store_true", help="compile, and time nothing")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    selected = [t for t in table() if re.search(options.match, f"{t.file} {t.name}")]
    built = {(t.name, t.file, v): library(t, v) for t in selected for v in (t.value(), *t.others)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda compile_it: compile_it(), {n: c for _, n, c in built.values()}.values()))
    if options.compile:
        return
    print(f"# Constants of the CPU kernels beside other values\n\n    python {' '.join(sys.argv)}\n")
    print(
        f"{cpu()}, kernels {_library.level}, {torch.get_num_threads()} threads, torch {torch.__version__}. A ratio is"
    )
    print("the time of a value over that of the shipped one, the median of rounds in turns, and the gain that of one")
    print("thread over that of all.\n")
    print("| constant | in csrc/ | call | shipped | ms | gain | others |\n|---|---|---|---|--:|--:|---|")
    for t in selected:
        values = (t.value(), *t.others)
        contenders = [operators(t, *built[t.name, t.file, v][:2]) for v in values]
        first, others = ratios(t.call, contenders, SECONDS)
        figures = f"{first:.3g} | {gain(t.call, contenders[0], SECONDS):.2f}"
        compared = ", ".join(f"{v}: {r:.2f}" for v, r in zip(t.others, others, strict=True))
        print(f"| `{t.name}` | {t.file} | {t.shape} | {values[0]} | {figures} | {compared} |", flush=True)


if __name__ == "__main__":
    main()
