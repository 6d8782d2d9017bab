"""Experts spread over 2 and 4 processes compute what a single process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_checks import read_checkpoint
from processes import CHECKS, mixture

from moe_kernels.distributed.dispatch import CachedByTensor

SCRIPT = Path(__file__).parent / "parallel_checks.py"
ROOT = SCRIPT.parent.parent


def start(folder: Path, size: int, *options: str) -> list[subprocess.Popen[bytes]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    commands = [[sys.executable, str(SCRIPT), str(rank), str(size), str(folder), *options] for rank in range(size)]
    return [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for command in commands]


def run(folder: Path, size: int) -> dict[str, list[str]]:
    """{name of a check: what it reported in each process}"""
    folder.mkdir()
    processes = start(folder, size)
    for process in processes:
        process.communicate(timeout=300)
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    return {name: [each.get(name, "did not run") for each in found] for name in CHECKS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, dict[str, list[str]]]:
    return {size: run(folder / str(size), size) for size in (4, 2)}  # the checkpoint of 4 is read by 2


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize(
    ("size", "name"), [(size, name) for size in (4, 2) for name in CHECKS if size in CHECKS[name][0]]
)
def test_several_processes_compute_what_one_does(found: dict[int, dict[str, list[str]]], size: int, name: str) -> None:
    assert found[size][name] == [""] * size, "\n".join(found[size][name])


@pytest.mark.xdist_group("processes")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_checkpoint_of_two_processes_is_read_by_one(found: dict[int, dict[str, list[str]]], folder: Path) -> None:
    read_checkpoint(mixture(), folder / "2")


def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    first, second = start(tmp_path, 2, "die")
    _, error = first.communicate(timeout=240)
    assert second.wait() == 9 and first.returncode != 0
    assert b"by peer" in error, error.decode()  # closed or reset


def test_a_cached_result_is_dropped_when_its_tensor_is_written_to() -> None:
    calls = []
    cached, x = CachedByTensor(lambda x: calls.append(1) or x.sum().item()), torch.ones(3)
    assert [cached(x), cached(x), cached(x.clone())] == [3, 3, 3] and len(calls) == 2
    x.add_(1)
    assert cached(x) == 6
