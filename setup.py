"""Builds the kernels: `moe_kernels._cpu_*`, one for each CPU level, `moe_kernels._cuda` if torch was built with CUDA,
and `moe_kernels._C`, which tells what was built.

Environment variables: MOE_KERNELS_CUDA=1 requires the CUDA library, even with a CPU build of torch, and 0 leaves it
out; TORCH_CUDA_ARCH_LIST names its architectures, as for torch's own extensions; MAX_JOBS limits how many compilers run
at a time.
"""

import math
import os
import platform
import re
import runpy
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = ("8.0", "9.0a", "10.0+PTX")
# The oldest supported torch, from pyproject.toml; a library built with any later one works with it too.
OLDEST_TORCH = re.search(r"torch>=(\d+)\.(\d+)", (ROOT / "pyproject.toml").read_text())
STABLE_ABI = f"0x{int(OLDEST_TORCH[1]):02x}{int(OLDEST_TORCH[2]):02x}000000000000"
SECONDS_TO_COMPILE = 5  # a CUDA file for one architecture, on one core of an AMD EPYC (Zen 5)


def refuse(message: str) -> NoReturn:
    raise SystemExit(f"moe_kernels: {message}")


def say(message: str) -> None:
    print(f"moe_kernels: {message}", flush=True)


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


@dataclass(frozen=True)
class Torch:
    """The installed torch, read from its files and never imported, since pip's isolated build environment hides it."""

    folder: Path
    version: str
    cuda: str | None  # the toolkit it was built with

    @classmethod
    def find(cls) -> "Torch | None":
        for packages in [*sys.path, *site.getsitepackages(), site.getusersitepackages()]:
            if (file := Path(packages) / "torch/version.py").is_file():
                facts = runpy.run_path(str(file))
                found = cls(file.parent, facts["__version__"], facts["cuda"])
                if version(found.version) < version(OLDEST_TORCH[0]):
                    refuse(f"{OLDEST_TORCH[0]} is needed, {file.parent} is {found.version}")
                return found
        return None


@dataclass(frozen=True)
class Toolkit:
    """The CUDA toolkit to build with."""

    nvcc: str
    release: str  # "13.0"

    @classmethod
    def find(cls, torch: Torch | None) -> "Toolkit | None":
        """The toolkit, of torch's major version of CUDA if torch has one; None to build for the CPU alone."""
        wanted = os.environ.get("MOE_KERNELS_CUDA", "")
        if wanted not in ("", "0", "1"):
            refuse(f"MOE_KERNELS_CUDA must be 0, 1 or unset, got {wanted!r}")
        if wanted == "0" or torch is None or (wanted == "" and torch.cuda is None):
            return None
        unfit = f"torch {torch.version} was built with CUDA {torch.cuda}" if torch.cuda else "MOE_KERNELS_CUDA=1"
        remedy = "set CUDA_HOME to a matching toolkit, or MOE_KERNELS_CUDA=0 to build for the CPU alone"
        home = os.environ.get("CUDA_HOME")
        places = [f"{home}/bin"] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
        nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
        if nvcc is None:
            unfit += (
                f", but nvcc is not in {places[0]}" if home else ", but nvcc is neither on PATH nor in CUDA_HOME/bin"
            )
        else:
            answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
            release = re.search(r"release (\d+\.\d+)", answer)[1]
            if torch.cuda is None or version(torch.cuda)[0] == version(release)[0]:
                return cls(nvcc, release)
            unfit += f", but {nvcc} is of CUDA {release}"
        if wanted == "1":
            refuse(f"{unfit}; {remedy}")
        say(f"no CUDA library: {unfit}; {remedy}")
        return None

    def architectures(self) -> list[str]:
        """Those in TORCH_CUDA_ARCH_LIST, or else the default ones that this nvcc knows, such as "9.0a", "10.0+PTX"."""
        listing = subprocess.run([self.nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
        known = set(re.findall(r"sm_(\d+)", listing))
        named = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; "))
        if named == [""]:
            return [a for a in DEFAULT_ARCHITECTURES if number(a).rstrip("af") in known]
        for a in named:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", a) or number(a).rstrip("af") not in known:
                refuse(f"TORCH_CUDA_ARCH_LIST must hold architectures that {self.nvcc} knows, such as 9.0a, got {a!r}")
        return named

    def runtime(self) -> str:
        """The linker's argument for libcudart.so, which NVIDIA's Python packages have only under a versioned name."""
        plan = subprocess.run(
            [self.nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True
        ).stderr
        home, name = Path(re.search(r"TOP=(.*)", plan)[1]), f"libcudart.so.{version(self.release)[0]}"
        files = [file for folder in ("lib64", "lib", "targets/*/lib") for file in home.glob(f"{folder}/{name}")]
        return str(files[0].resolve()) if files else "-lcudart"


def number(architecture: str) -> str:
    """ "90a" for "9.0a" and "9.0a+PTX"."""
    return architecture.removesuffix("+PTX").replace(".", "")


def jobs() -> int:
    """How many compilers run at a time."""
    wanted = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    if not wanted.isdecimal() or int(wanted) < 1:
        refuse(f"MAX_JOBS must be a positive integer, got {wanted!r}")
    return int(wanted)


# The levels that the CPU kernels are compiled for; the best that a CPU has is loaded. They are fixed, unlike
# -march=native, so that the same level gives the same numbers on every machine.
CPU_LEVELS = (
    ("x86-64", "x86-64-v3", "x86-64-v4") if platform.machine() in ("x86_64", "AMD64") else (platform.machine(),)
)


def library_name(level: str) -> str:
    return "_cpu_" + re.sub(r"\W", "_", level)


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


class NinjaBuild(build_ext):
    """Compiles each extension through one generated ninja file: parallel, and incremental in a work tree."""

    def build_extension(self, ext: Extension) -> None:
        from ninja.ninja_syntax import Writer

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(folder / "build.ninja", "w") as file:
            ninja = Writer(file, width=200)
            deps = "-MMD -MF $out.d"
            ninja.rule(
                "compile",
                f"$compiler {deps} $flags $defines -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="compile $in",
            )
            ninja.rule("link", "$linker -shared $in -o $out $libraries", description="link $out")
            rules = self.cuda_rules if ext.name.endswith("._cuda") else self.cpu_rules
            rules(ninja, ext.name, ext.sources, str(target))
            ninja.default(str(target))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder), "-j", str(jobs())], check=True)

    def cpu_rules(self, n: Any, name: str, files: list[str], target: str) -> None:
        import pybind11

        march = [f"-march={x}" for x in CPU_LEVELS if name.endswith(library_name(x)) and x.startswith("x86")]
        facts = {
            "CPU_LEVELS": " ".join(CPU_LEVELS),
            "CUDA": toolkit.release if toolkit else "",
            "CUDA_OPERATORS": " ".join(Path(s).stem for s in sources("cuda", ".cu")) if toolkit else "",
            "CUDA_ARCHS": " ".join(f"sm_{number(a)}" for a in toolkit.architectures()) if toolkit else "",
        }
        flags = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-fno-math-errno"]
        flags += ["-fno-trapping-math", *march, "-Wall", "-Wextra", "-Wno-psabi", "-Werror=return-type"]
        # Ahead of torch's headers, which contain a copy of pybind11.
        include = [f"-isystem {pybind11.get_include()}", f"-isystem {sysconfig.get_path('include')}"]
        n.variable("compiler", os.environ.get("CXX", "g++"))
        n.variable("linker", "$compiler")
        n.variable("flags", " ".join([*flags, *include, *self.torch_flags()]))
        n.variable("libraries", self.link_flags())
        for file in files:
            defines = facts if Path(file).name == "module.cpp" else {}
            values = {"defines": " ".join(f"""-DMOE_KERNELS_{key}='"{value}"'""" for key, value in defines.items())}
            n.build(self.object(file), "compile", str(ROOT / file), variables=values)
        n.build(target, "link", [self.object(file) for file in files])

    def cuda_rules(self, n: Any, name: str, files: list[str], target: str) -> None:
        architectures = toolkit.architectures()
        codes = [f"-gencode=arch=compute_{number(a)},code=sm_{number(a)}" for a in architectures]
        codes += [f"-gencode=arch=compute_{number(a)},code=compute_{number(a)}" for a in architectures if "+" in a]
        at_once = min(len(files), jobs())
        seconds = math.ceil(len(files) / at_once) * len(architectures) * SECONDS_TO_COMPILE
        say(
            f"compiling {len(files)} CUDA files for {', '.join(f'sm_{number(a)}' for a in architectures)} with CUDA "
            f"{toolkit.release}: about {seconds} s, {at_once} at a time (MOE_KERNELS_CUDA=0 leaves them out)"
        )
        flags = ["-O3", "-std=c++17", "-Xcompiler -fPIC,-fvisibility=hidden", f"--threads {jobs() // at_once}"]
        n.variable("compiler", toolkit.nvcc)
        n.variable("linker", os.environ.get("CXX", "g++"))
        n.variable("flags", " ".join([*flags, *codes, "-DUSE_CUDA", *self.torch_flags()]))
        # -z defs: a symbol that none of these libraries has is an error here, not only when the library is loaded.
        n.variable("libraries", f"-Wl,-z,defs -L. -ltorch_cuda {toolkit.runtime()} {self.link_flags()}")
        n.rule("stub", "$linker -shared -fPIC -Wl,-soname,$out $in -o $out")
        n.build("libtorch_cuda.so", "stub", str(ROOT / "csrc/cuda/torch_cuda_stub.cpp"))
        for file in files:
            n.build(self.object(file), "compile", str(ROOT / file))
        n.build(target, "link", [self.object(file) for file in files], implicit="libtorch_cuda.so")

    def torch_flags(self) -> list[str]:
        # The version is part of every command, so that everything is recompiled for another torch in the same place.
        defines = [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", f"""-DMOE_KERNELS_TORCH='"{torch.version}"'"""]
        return [*defines, f"-I{ROOT / 'csrc'}", f"-isystem {torch.folder / 'include'}"]

    def link_flags(self) -> str:
        # -lstdc++ first: libtorch_cpu exports parts of its own C++ library, and ours must be the system's.
        return f"-lstdc++ -L{torch.folder / 'lib'} -ltorch_cpu"

    @staticmethod
    def object(source: str) -> str:
        return Path(source).name + ".o"


if __name__ == "__main__":
    torch = Torch.find()
    toolkit = Toolkit.find(torch)
    extensions = [Extension("moe_kernels._C", ["csrc/module.cpp"])]
    extensions += [Extension(f"moe_kernels.{library_name(x)}", sources("cpu", ".cpp")) for x in CPU_LEVELS]
    if toolkit:
        extensions.append(Extension("moe_kernels._cuda", sources("cuda", ".cu")))
    setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild}, setup_requires=[] if torch else [OLDEST_TORCH[0]])
