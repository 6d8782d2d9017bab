"""Training under FSDP2 with an attack in the loop, in one process and in two."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sharded_training.py")


@pytest.mark.parametrize("processes", [1, 2])
def test_an_attack_leaves_no_trace_in_sharded_training(processes: int, tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, tmp_path / "store"]
    workers = [
        subprocess.Popen([*command, str(rank), str(processes)], stderr=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]
    outputs = [worker.communicate(timeout=300)[1] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), "\n".join(outputs)
