"""Tries the supported versions of torch, each in an environment of its own, and writes docs/versions.md.

    python checks/versions.py                          # all of it; a torch built with CUDA is 5 GB on disk
    python checks/versions.py 2.11.0 --steps build     # a part, whose results are added to those of earlier parts

With each torch, the library is built from source (build), loaded under every other torch (load) and tested on the CPU
(test), and every GPU kernel is compiled with the matching Triton (compile).
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/versions.md"
OLDEST = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[0] + ".0"  # also the GPU machine's
MADE_WITH = re.findall(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)[0]
NEWEST = "2.14.1"
VERSIONS = list(dict.fromkeys([OLDEST, MADE_WITH, NEWEST]))
TOOLS = ["numpy", "setuptools>=77", "pybind11", "ninja", "triton>=3.6"]
TESTERS = ["hypothesis", "pytest", "pytest-benchmark", "pytest-xdist"]
TRAINERS = ["matplotlib", "pillow", "safetensors", "scikit-learn", "scipy", "tqdm"]  # a test attacks a trained model
TESTS = ["ops", "pgd*", "apgd", "attack_mode", "triton_*", "cuda_build"]
ARCHITECTURES = ("80", "90", "100")

# Every operator has a kernel for the CPU and, under a torch built with CUDA, for CUDA, except algorithms that are for
# the CPU only; and there is no warning that a library cannot be loaded.
REGISTERED = """
import warnings
warnings.simplefilter("error")
import torch, moe_kernels
from moe_kernels import _C, _library
def without(key):
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [op for op in _library.OPERATORS if not has_kernel(f"moe_kernels::{op}", key)]
assert not without("CPU"), without("CPU")
if torch.version.cuda:
    assert all(op.startswith("winograd_") for op in without("CUDA")), without("CUDA")
print(len(_library.OPERATORS), "operators, built with", _C.built_with_torch)
"""


FACTS = """
import platform, torch, triton
print(platform.python_version(), torch.__version__, torch.version.cuda or "none", triton.__version__)
"""


class StepFailedError(Exception):
    """A step that failed, with the end of its log."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment with one torch, and a copy of the work tree in which it builds."""

    version: str
    folder: Path

    @property
    def tree(self) -> Path:
        return self.folder / "tree"

    @property
    def results(self) -> Path:
        return self.folder / "results.json"

    def run(self, name: str, *arguments: str, tree: Path | None = None, **variables: str) -> str:
        """Runs this environment's Python in a tree; returns its output."""
        tree = tree or self.tree
        inherited = {k: v for k, v in os.environ.items() if k not in ("PIP_CONSTRAINT", "TRITON_INTERPRET")}
        path = f"{self.folder / 'bin'}:{inherited['PATH']}"
        environment = inherited | {"PATH": path, "PYTHONPATH": f"{tree}:{tree / 'python'}"} | variables
        command = [str(self.folder / "bin/python"), *arguments]
        log = self.folder / f"{name}.log"
        with open(log, "w") as file:
            code = subprocess.run(command, cwd=tree, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
        text = log.read_text()
        if code:
            raise StepFailedError(
                f"torch {self.version}, {name}: exit {code}, see {log}\n" + "\n".join(text.splitlines()[-15:])
            )
        return text

    def prepare(self) -> dict[str, str]:
        """Makes the environment if it is missing, and copies the current tree; returns the versions in it."""
        if not (self.folder / "bin/python").exists():
            say(f"torch {self.version}: making an environment; a build with CUDA is a download of up to 3 GB, once")
            subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=True)
        copy_tree(self.tree)
        self.run("install", "-m", "pip", "install", "-q", f"torch=={self.version}", *TOOLS, *TESTERS, *TRAINERS)
        facts = self.run("facts", "-c", FACTS).split()
        return dict(zip(("python", "torch", "cuda", "triton"), facts, strict=True))

    def build(self) -> str:
        """Builds from source; if there is nvcc, the CUDA library too, for one architecture (`compile` covers all)."""
        wanted = {"MOE_KERNELS_CUDA": "1" if shutil.which("nvcc") else "0", "TORCH_CUDA_ARCH_LIST": "9.0a"}
        self.run("build", "setup.py", "-q", "build_ext", "--inplace", **wanted)
        operators = self.run("registered", "-c", REGISTERED).split(",")[0]
        return f"{operators}, {'with' if wanted['MOE_KERNELS_CUDA'] == '1' else 'without'} CUDA"

    def load(self, others: list["Environment"]) -> str:
        """Loads the libraries that the others built: operators must be registered and agree with the reference."""
        loaded = []
        for other in others:
            if other.version != self.version and next(other.tree.glob("moe_kernels/_C*.so"), None):
                self.run(f"load-{other.version}", "-c", REGISTERED, tree=other.tree)
                options = ["-k", "test_values and float32", "-p", "no:cacheprovider"]
                self.run(f"values-{other.version}", "-m", "pytest", "tests/test_ops.py", *options, tree=other.tree)
                loaded.append(other.version)
        return f"of {' and '.join(loaded)}" if loaded else "none to load"

    def test(self) -> str:
        """Runs the tests of operators and attacks on the CPU."""
        names = [*TESTS, *(p.stem for p in ROOT.glob("moe_kernels/ops/*.py") if p.stem != "__init__")]
        files = sorted({str(p.relative_to(self.tree)) for n in names for p in self.tree.glob(f"tests/test_{n}.py")})
        threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
        text = self.run("test", "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", *files, **threads)
        return text.splitlines()[-1].split(" in ")[0]

    def compile(self) -> str:
        """Compiles every GPU kernel for every architecture; none may spill."""
        text = self.run("compile", "checks/gpu_static.py", "--arch", *ARCHITECTURES)
        return f"{sum(' sm_' in line for line in text.splitlines())} without a spill"


def copy_tree(to: Path) -> None:
    """Copies the files that git tracks or would track; unchanged ones stay, so that only changes are recompiled."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = [n for n in listing.split("\0") if n and (ROOT / n).is_file()]
    kept = {to / name for name in names}
    for old in to.rglob("*"):
        if old.is_file() and old not in kept and old.suffix != ".so" and old.relative_to(to).parts[0] != "build":
            old.unlink()
    for name in names:
        source, target = ROOT / name, to / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def say(text: str) -> None:
    print(text, flush=True)


def page(rows: list[dict[str, str]]) -> str:
    columns = {
        "torch": "torch",
        "cuda": "its CUDA",
        "triton": "Triton",
        "python": "Python",
        "build": "builds from source",
        "load": "loads the libraries",
        "test": "tests on the CPU",
        "compile": "GPU kernels for sm_80, sm_90a, sm_100",
        "date": "date",
    }
    lines = [" | ".join(columns.values()), " | ".join("---" for _ in columns)]
    lines += [" | ".join(row.get(key, "not run") for key in columns) for row in rows]
    table = "\n".join(f"| {line} |" for line in lines)
    text = PAGE.read_text()
    return re.sub(r"(?<=<!-- table -->\n).*(?=\n<!-- end -->)", lambda _: table, text, flags=re.S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="of torch")
    parser.add_argument(
        "--steps",
        nargs="*",
        choices=["build", "load", "test", "compile"],
        help="only these steps; with none, only write the page",
    )
    parser.add_argument("--environments", type=Path, default=ROOT / ".versions", help="folder for the environments")
    options = parser.parse_args()
    steps = ["build", "load", "test", "compile"] if options.steps is None else options.steps
    every = [Environment(v, options.environments.resolve() / v) for v in VERSIONS]
    chosen = [e for e in every if e.version in options.versions]
    failures = []
    # Step by step for all environments, since a library must be built before others can load it.
    for environment in chosen if steps else []:
        try:
            record(environment, environment.prepare())
        except (StepFailedError, OSError) as error:
            failures.append(f"{environment.version} cannot be installed: {error}")
    ready = [e for e in chosen if e.results.exists()]
    for step in steps:
        for environment in ready:
            say(f"torch {environment.version}: {step} ...")
            try:
                outcome = environment.load(every) if step == "load" else getattr(environment, step)()
            except StepFailedError as error:
                failures.append(str(error))
                outcome = "**fails**"
            say(f"torch {environment.version}: {step}: {outcome}")
            record(environment, {step: outcome, "date": datetime.date.today().isoformat()})
    PAGE.write_text(page([json.loads(e.results.read_text()) for e in every if e.results.exists()]))
    say("\n".join(["", *failures]) if failures else f"nothing failed; {PAGE}")
    return 1 if failures else 0


def record(environment: Environment, found: dict[str, str]) -> None:
    known = json.loads(environment.results.read_text()) if environment.results.exists() else {}
    environment.results.write_text(json.dumps(known | found, indent=1))


if __name__ == "__main__":
    sys.exit(main())
