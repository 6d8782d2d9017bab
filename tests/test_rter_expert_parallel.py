"""RT-ER with experts spread over 2 and 4 processes equals RT-ER in one, resumes after a kill, and is evaluated."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rter.__main__ import main
from rter.checkpoint import read_lines
from rter.settings import make_config
from runs import assert_equal_to_rounding

SETTINGS = ["--method", "rt-er", "--epochs", "2", "--batch-size", "300", "--width", "4", "--attack-steps", "2", "--ema",
            "0.9", "--held-out", "60", "--eval-every", "1", "--clip-norm", "1", "--awp-gamma", "0.005",
            "--awp-warmup", "0"]  # fmt: skip


def torchrun(run: Path, processes: int, *options: str) -> "subprocess.Popen[bytes]":
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = ["-m", "rter", "train", "--out", str(run), "--expert-parallel", str(processes), *SETTINGS, *options]
    return subprocess.Popen([*launch, *command], env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "alone"
    assert main(["train", "--out", str(run), *SETTINGS]) == 0
    return run


def test_four_processes_equal_one_up_to_rounding_and_their_run_is_evaluated(alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert torchrun(run, 4).wait(timeout=300) == 0
    assert_equal_to_rounding(run, alone, terms=6)
    strength = ["--suite", "quick", "--steps", "2", "--restarts", "1"]
    assert main(["evaluate", str(run), *strength]) == 0 and (run / "report.json").exists()


def test_two_processes_resume_after_a_kill_as_one_would(alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = torchrun(run, 2, "--save-every", "0")
    while not (run / "resume.safetensors").exists():
        assert launcher.poll() is None
        time.sleep(0.001)
    children = Path(f"/proc/{launcher.pid}/task").glob("*/children")
    for pid in (*(int(pid) for listed in children for pid in listed.read_text().split()), launcher.pid):
        os.kill(pid, signal.SIGKILL)
    launcher.wait()
    assert len(read_lines(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []) < 2
    shutil.copytree(run, tmp_path / "killed")
    assert torchrun(run, 2, "--resume").wait(timeout=300) == 0
    assert_equal_to_rounding(run, alone, terms=6)
    assert main(["train", "--out", str(tmp_path / "killed"), "--resume"]) == 0  # or in one process
    assert_equal_to_rounding(tmp_path / "killed", alone, terms=6)


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(tmp_path / "run"), "--expert-parallel", "2"]) != 0
    assert "expert_parallel must be the number of processes, 1, got 2" in capsys.readouterr().err
    assert make_config().num_experts == 4
