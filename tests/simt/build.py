"""Compiles and runs the drivers: CUDA device code under g++'s address and undefined-behaviour sanitizers."""

import fcntl
import functools
import hashlib
import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PROGRAMS = ROOT / "build/simt"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]


@functools.cache
def _program(driver: str) -> Path:
    """The compiled driver, kept until a source changes; if several processes need it, one compiles it."""
    source = HERE / f"{driver}.cpp"
    command = [os.environ.get("CXX", "g++"), *FLAGS, f"-I{ROOT / 'csrc'}", f"-I{HERE}", str(source)]
    headers = sorted([*HERE.glob("*.h"), *ROOT.glob("csrc/*/*.h"), *ROOT.glob("csrc/cuda/*.cuh")])
    content = repr(command).encode() + b"".join(p.read_bytes() for p in (source, *headers))
    program = PROGRAMS / f"{driver}-{hashlib.sha256(content).hexdigest()[:16]}"
    PROGRAMS.mkdir(parents=True, exist_ok=True)
    with open(PROGRAMS / f"{driver}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            for old in PROGRAMS.glob(f"{driver}-*"):
                old.unlink()
            unfinished = program.with_suffix(".unfinished")
            subprocess.run([*command, "-o", str(unfinished)], check=True)
            unfinished.rename(program)
    return program


def run(driver: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs tests/simt/<driver>.cpp."""
    command = [str(_program(driver)), *map(str, arguments)]
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
