"""Breaks kernels on purpose, one at a time in a copy of the tree, and shows which test catches it.

Prints docs/mutations.md. Exits with 1 if a test does not pass before its mutation, or passes after it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
EMULATED = ("tests/test_cuda_emulated.py", "-k")
INTERPRETED = ("tests/test_triton_expert_linear.py", "-k")


@dataclass(frozen=True)
class Mutation:
    kind: str
    file: str
    old: str
    new: str
    gate: tuple[str, ...]  # pytest's arguments


MUTATIONS = [
    Mutation(
        "off-by-one in offsets",
        "moe_kernels/triton_kernels/tiles.py",
        "return expert, first, tl.load(offsets + expert + 1)",
        "return expert, first, tl.load(offsets + expert + 1) - 1",
        (*INTERPRETED, "test_forward_and_gradients_on_all_cases and expert_linear-an_expert_gets_none and float32"),
    ),
    Mutation(
        "dropped mask",
        "csrc/cuda/combine.cuh",
        "if (t >= s.rows || column >= s.width) return;\n  wide_t<T> sum[V] = {};",
        "if (t >= s.rows) return;\n  wide_t<T> sum[V] = {};",
        (*EMULATED, "combine-odd_sizes-float32"),
    ),
    Mutation(
        "wrong stride",
        "csrc/cuda/kl_divergence.cuh",
        "{adv + b * classes, classes}};\n  const double sum",
        "{adv + b, classes}};\n  const double sum",
        (*EMULATED, "kl_divergence-odd_sizes-float32"),
    ),
    Mutation(
        "missing barrier",
        "csrc/cuda/expert_sum.cuh",
        "sums[y][lane] = sum;\n    __syncthreads();",
        "sums[y][lane] = sum;",
        (*EMULATED, "expert_sum-odd_sizes-float32"),
    ),
    Mutation(
        "unordered sum",
        "csrc/cuda/expert_sum.cuh",
        "sums[y][lane] = sum;\n    __syncthreads();",
        "sums[y][lane] = 0;\n    __syncthreads();\n    atomicAdd(&sums[0][lane], sum);\n    __syncthreads();",
        (*EMULATED, "expert_sum-odd_sizes-float32"),
    ),
]


def copy_of_tree(folder: Path) -> None:
    """The tracked files and the built libraries."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    built = (str(p.relative_to(ROOT)) for p in ROOT.glob("moe_kernels/*.so"))
    for name in (*filter(None, listed.split("\0")), *built):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def run_gate(folder: Path, gate: tuple[str, ...]) -> tuple[bool, str]:
    """Whether the gate passes, and if not, the first thing that it printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *gate]
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{folder / 'python'}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)} did not run:\n{done.stdout}{done.stderr}")
    said = "\n".join(re.findall(r"^E +(.*)", done.stdout, re.MULTILINE))
    telling = re.search(r"AddressSanitizer: [\w-]+|simt: .*|error \S+ beyond the bound \S+|NaN in the result", said)
    return done.returncode == 0, telling.group() if telling else said.split("\n")[0]


def cell(code: str) -> str:
    return "`" + re.sub(r"\s+", " ", code).replace("|", r"\|") + "`"


HEADER = """# Kernels broken on purpose

Written by `python checks/mutations.py > docs/mutations.md`. Each mutation is made alone, in a copy of the tree; its
test, the gate, passes before it and fails after it.

| mutation | file | from | to | gate (`pytest`) | what it printed |
|---|---|---|---|---|---|"""


def main() -> None:
    print(HEADER, flush=True)
    survived, healthy = False, set[tuple[str, ...]]()
    for m in MUTATIONS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            copy_of_tree(folder)
            source = (folder / m.file).read_text()
            if source.count(m.old) != 1:
                raise SystemExit(f"{m.file} must contain exactly once: {m.old}")
            if m.gate not in healthy:
                passes, said = run_gate(folder, m.gate)
                if not passes:
                    raise SystemExit(f"{m.gate} fails before any mutation: {said}")
                healthy.add(m.gate)
            (folder / m.file).write_text(source.replace(m.old, m.new))
            passes, said = run_gate(folder, m.gate)
        survived |= passes
        shown = "NOTHING: it passed" if passes else f"`{said}`"
        gate = f"`{m.gate[0]} -k '{m.gate[2]}'`"
        print(f"| {m.kind} | {m.file} | {cell(m.old)} | {cell(m.new)} | {gate} | {shown} |", flush=True)
    sys.exit(survived)


if __name__ == "__main__":
    main()
