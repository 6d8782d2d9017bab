"""Builds the kernels: `moe_kernels._C` for the CPU always, `moe_kernels._cuda` where nvcc is found."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CUDA_ARCHS = ("80", "90a", "100")
STABLE_ABI = "0x020a000000000000"  # torch 2.10: one build serves every later torch


def find_nvcc() -> str | None:
    """Path of nvcc, or None to build without CUDA. MOE_KERNELS_CUDA: 1 demands it, 0 skips it."""
    wanted = os.environ.get("MOE_KERNELS_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"MOE_KERNELS_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return None
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{cuda_home}/bin")
    if wanted == "1" and nvcc is None:
        raise SystemExit("MOE_KERNELS_CUDA=1, but nvcc is neither on PATH nor in CUDA_HOME/bin")
    return nvcc


def simd_flags() -> list[str]:
    # A fixed level, not -march=native: the same source gives the same numbers on every machine.
    return ["-march=x86-64-v3"] if platform.machine() in ("x86_64", "AMD64") else []


class NinjaBuild(build_ext):
    """Compiles each extension through one generated ninja file: parallel and incremental."""

    def build_extension(self, ext: Extension) -> None:
        from ninja.ninja_syntax import Writer

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = (Path(self.build_temp) / ext.name).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        cuda = ext.name.endswith("._cuda")
        compiler, flags, link = self.cuda_toolchain() if cuda else self.cpu_toolchain()
        objects = {s: str(build_dir / (Path(s).name + ".o")) for s in ext.sources}
        with open(build_dir / "build.ninja", "w") as file:
            n = Writer(file, width=200)
            deps = "-MMD -MF $out.d"
            n.rule("compile", f"{compiler} {deps} {' '.join(flags)} -c $in -o $out", depfile="$out.d", deps="gcc")
            n.rule("link", f"{os.environ.get('CXX', 'g++')} -shared $in -o $out {' '.join(link)}")
            for source, obj in objects.items():
                n.build(obj, "compile", str((ROOT / source).resolve()))
            n.build(str(target), "link", list(objects.values()))
            n.default(str(target))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build_dir)], check=True)

    def torch_paths(self) -> tuple[list[str], list[str]]:
        import torch

        base = Path(torch.__file__).parent
        return [f"-I{ROOT / 'csrc'}", f"-isystem {base / 'include'}"], [f"-L{base / 'lib'}", "-ltorch_cpu"]

    def cpu_toolchain(self) -> tuple[str, list[str], list[str]]:
        import pybind11
        import torch

        include, link = self.torch_paths()
        include = [f"-isystem {pybind11.get_include()}", f"-isystem {sysconfig.get_path('include')}", *include]
        facts = {
            "SIMD": " ".join(simd_flags()),
            "TORCH": torch.__version__,
            "CUDA_OPERATORS": " ".join(Path(s).stem for s in sources("cuda", ".cu")) if find_nvcc() else "",
            "CUDA_ARCHS": " ".join(f"sm_{a}" for a in CUDA_ARCHS) if find_nvcc() else "",
        }
        defines = [f"""-DMOE_KERNELS_{name}='"{value}"'""" for name, value in facts.items()]
        flags = [
            "-O3",
            "-std=c++17",
            "-fPIC",
            "-fvisibility=hidden",
            "-fopenmp-simd",
            "-fno-math-errno",
            "-fno-trapping-math",
        ]
        warn = ["-Wall", "-Wextra", "-Werror=return-type"]
        abi = [f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
        return os.environ.get("CXX", "g++"), [*flags, *simd_flags(), *warn, *abi, *defines, *include], link

    def cuda_toolchain(self) -> tuple[str, list[str], list[str]]:
        nvcc = find_nvcc()
        assert nvcc is not None
        include, link = self.torch_paths()
        cuda_lib = Path(nvcc).resolve().parent.parent / "lib64"
        if not cuda_lib.is_dir():  # nvcc may be a wrapper script outside the toolkit
            cuda_lib = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "lib64"
        archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHS]
        ptx = [f"-gencode=arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}"]
        flags = ["-O3", "-std=c++17", "-Xcompiler -fPIC,-fvisibility=hidden", "--threads 2"]
        abi = [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DUSE_CUDA"]
        link = [*link, f"-L{cuda_lib}", "-lcudart"]
        return nvcc, [*flags, *archs, *ptx, *abi, *include], link


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def torch_pin() -> list[str]:
    """The torch of constraints.txt, for pip's isolated build environment, where the user's torch is not seen."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line.startswith("torch==")]


extensions = [Extension("moe_kernels._C", ["csrc/module.cpp", *sources("cpu", ".cpp")])]
if find_nvcc():
    extensions.append(Extension("moe_kernels._cuda", sources("cuda", ".cu")))

setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild}, setup_requires=torch_pin())
