"""Compiles and runs the drivers: CUDA device code under g++'s address and undefined-behaviour sanitizers."""

import functools
import os
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="simt")


@functools.cache
def _program(driver: str) -> Path:
    program = Path(_folder().name) / driver
    include = [f"-I{HERE.parent.parent / 'csrc'}", f"-I{HERE}"]
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *FLAGS, *include, str(HERE / f"{driver}.cpp"), "-o", str(program)], check=True)
    return program


def run(driver: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs tests/simt/<driver>.cpp, compiled once per session."""
    command = [str(_program(driver)), *map(str, arguments)]
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
