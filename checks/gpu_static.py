"""Compiles every GPU kernel for every architecture, without a GPU, and inspects the machine code.

Prints one line per kernel, architecture and configuration. Exits with 1 if a kernel spills registers or needs more
shared memory than the architecture has, or if a GEMM has no tensor-core instructions, loads operands less than 16 bytes
at a time, or adds two products of one step into one accumulator. To see a part: `--arch 90 --match forward`.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.triton_kernels.launch import Launch

ROOT = Path(__file__).parent.parent
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

# Modules of moe_kernels.triton_kernels whose static_launches() yields (architecture, name, launch).
MODULES = [
    "expert_conv2d",
    "expert_conv2d_weight_grad",
    "expert_linear",
    "expert_linear_weight_grad",
    "expert_mlp",
]
# A configuration table's "default" is for consumer GPUs.
TARGETS: dict[int | str, tuple[int, ...]] = {80: (80,), 90: (90,), 100: (100,), "default": (86, 120)}
CUDA_TARGETS = {80: "80", 90: "90a", 100: "100"}
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}

# architecture: (shared memory of one block and of a multiprocessor in KB, warps of a multiprocessor)
LIMITS = {80: (163, 164, 64), 86: (99, 100, 48), 90: (227, 228, 64), 100: (227, 228, 64), 120: (99, 100, 48)}
ASSUMED_WARPS = 8  # of a CUDA C++ kernel, whose block size is known only at launch

LOOPS = ("scf.for", "scf.while")
REGIONS = (*LOOPS, "scf.if")

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}


@dataclass(frozen=True)
class Report:
    """The resources that the machine code of one kernel needs, and what is wrong with it."""

    name: str
    arch: int
    registers: int
    shared: int
    spills: int
    stack: int
    warps: int
    tensor_core: str
    needs_tensor_cores: bool
    code: str
    complaints: tuple[str, ...] = ()

    def occupancy(self) -> float:
        """The fraction of a multiprocessor's warps that registers and shared memory let run at once."""
        _, shared_kb, max_warps = LIMITS[self.arch]
        registers = -(-self.registers * 32 // 256) * 256 * self.warps  # of a block; allocated to warps in units of 256
        blocks = min(65536 // registers, shared_kb * 1024 // (self.shared + 1024), max_warps // self.warps)
        return blocks * self.warps / max_warps

    def faults(self) -> list[str]:
        found = []
        if self.spills:
            found.append("SPILLS")
        if self.needs_tensor_cores and not self.tensor_core:
            found.append(f"NO {TENSOR_CORES[self.arch]}")
        if self.shared > LIMITS[self.arch][0] * 1024:
            found.append("SHARED MEMORY")
        return [*found, *self.complaints]

    def line(self) -> str:
        return (
            f"{self.name:58} sm_{self.arch:<4}{self.registers:5}{self.shared:9}{self.spills:7}{self.stack:6}  "
            f"{self.tensor_core or '-':8}{self.occupancy():6.0%}  {' '.join(self.faults())}"
        ).rstrip()


HEADER = f"{'kernel':58} {'arch':7}{'regs':>5}{'shared':>9}{'spills':>7}{'stack':>6}  {'matrix':8}{'warps':>6}"


def source(launch: Launch) -> ASTSource:
    """The source that Triton would compile for this launch, with aligned pointers and integers specialised."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        elif parameter.is_constexpr or value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, Tensor) or (signature[name][0] == "i" and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def tool(name: str, *arguments: str | Path) -> str:
    return subprocess.run([str(TOOLS / name), *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def sections(listing: str, heading: str) -> dict[str, str]:
    """Splits a listing of cuobjdump by function."""
    parts = re.split(heading, listing)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def inspect(
    cubin: Path, arch: int, name: Callable[[str], str], warps: int, dynamic_shared: int = 0, tensor_cores: bool = False
) -> list[Report]:
    """A report on every kernel of a cubin; `name` turns a symbol into the name to print."""
    code = sections(tool("cuobjdump", "-sass", cubin), r"\s*Function : (\S+)\n")
    resources = sections(tool("cuobjdump", "--dump-resource-usage", cubin), r"\s*Function (\S+):\n")
    reports = []
    for symbol, sass in code.items():
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", resources[symbol])}
        found = re.search(rf"\b{TENSOR_CORES[arch]}\b", sass)
        reports.append(
            Report(
                name=name(symbol),
                arch=arch,
                registers=used["REG"],
                shared=dynamic_shared or used["SHARED"],
                spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
                stack=used["STACK"],
                warps=warps,
                tensor_core=found.group() if found else "",
                needs_tensor_cores=tensor_cores,
                code=sass,
            )
        )
    return reports


def triton_kernel(name: str, launch: Launch, arch: int) -> list[Report]:
    kernel = triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=launch.options())
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        reports = inspect(cubin, arch, lambda _: name, launch.num_warps, kernel.metadata.shared, launch.tensor_cores)
    return [replace(r, complaints=complaints(launch, kernel.asm["ttir"], r.code)) for r in reports]


def complaints(launch: Launch, ttir: str, sass: str) -> tuple[str, ...]:
    """What is wrong with a kernel, apart from the resources that it needs."""
    found = []
    if allows_wide_loads(launch) and narrow_loads(sass, indices=launch.arguments.get("rows") is not None):
        found.append("NARROW LOADS")
    if shares_accumulator(ttir):
        found.append("SHARED ACCUMULATOR")
    return tuple(found)


def allows_wide_loads(launch: Launch) -> bool:
    """Whether this is a GEMM whose rows, of the widths below, are all multiples of 16 bytes."""
    if "x" not in launch.arguments:
        return False
    x = launch.arguments["x"]
    size = (x.base if isinstance(x, TensorDescriptor) else x).element_size()
    widths = [launch.arguments[name] for name in ("C_IN", "C_OUT", "n", "k") if name in launch.arguments]
    return all(width * size % 16 == 0 for width in widths)


def narrow_loads(sass: str, indices: bool) -> int:
    """Counts loads of one or two bytes, and copies to shared memory of less than 16 unless they are `indices` of 4."""
    copies = [] if indices else re.findall(r"\bLDGSTS\.(?!\S*\b128\b)\S+", sass)
    return len(copies) + len(re.findall(r"\bLDG\.\S*\b[US](?:8|16)\b", sass))


def shares_accumulator(ttir: str) -> bool:
    """Whether a step of a loop adds a product to a value that already contains another product of that step."""
    products: list[set[str]] = [set()]  # for each enclosing loop, the values that contain a product of the step
    regions: list[tuple[str, str]] = []  # (operation, result)
    for line in map(str.strip, ttir.splitlines()):
        result, operation, operands = re.match(r"(?:(%\w+)(?::\d+)? = )?(\S*)(.*)", line).groups()  # type: ignore[union-attr]
        used = re.findall(r"%\w+", operands)
        if operation == "tt.dot" and used[2] in products[-1]:
            return True
        if line.startswith("}"):
            region = regions.pop()
            if region[0] in LOOPS:
                products.pop()
        if operation == "tt.dot" or (result and operation not in REGIONS and products[-1].intersection(used)):
            products[-1].add(result)
        if operation == "scf.yield" and regions[-1][0] == "scf.if" and products[-1].intersection(used):
            products[-1].add(regions[-1][1])
        if line.endswith("{"):
            regions.append(region if line.startswith("}") else (operation, result))
            if regions[-1][0] in LOOPS:
                products.append(set())
    return False


def cuda_file(path: Path, arch: int) -> list[Report]:
    torch_include = Path(torch.__file__).parent / "include"
    target = f"-gencode=arch=compute_{CUDA_TARGETS[arch]},code=sm_{CUDA_TARGETS[arch]}"
    include = [f"-I{ROOT / 'csrc'}", "-isystem", str(torch_include)]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = ["nvcc", "-cubin", "-O3", "-std=c++17", target, "-DUSE_CUDA", *include, str(path), "-o", str(cubin)]
        subprocess.run(command, check=True)
        return inspect(cubin, arch, partial(demangled, path.stem), ASSUMED_WARPS)


def demangled(stem: str, symbol: str) -> str:
    text = subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True).stdout.strip()
    return f"{stem}: {re.sub(r'^void |[(]anonymous namespace[)]::|[(].*', '', text)}"


def jobs() -> Iterator[tuple[str, int, Callable[[], list[Report]]]]:
    """(name, architecture, what compiles and inspects it) of every kernel in every shipped configuration."""
    for name_of_module in MODULES:
        module = importlib.import_module(f"moe_kernels.triton_kernels.{name_of_module}")
        for table_arch, name, launch in module.static_launches():
            for arch in TARGETS[table_arch]:
                yield name, arch, partial(triton_kernel, name, launch, arch)
    for path in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        for arch in CUDA_TARGETS:
            yield path.stem, arch, partial(cuda_file, path, arch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", choices=LIMITS, default=LIMITS, help="only these architectures")
    parser.add_argument("--match", default="", help="only kernels whose name contains this regular expression")
    options = parser.parse_args()
    selected = [job for name, arch, job in jobs() if re.search(options.match, name) and arch in options.arch]
    if not selected:
        sys.exit("no kernel matches")
    print(HEADER, flush=True)
    faults = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for reports in pool.map(lambda job: job(), selected):
            for report in reports:
                print(report.line(), flush=True)
                faults += len(report.faults())
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
