"""Two processes compute what one does, with the draws and the load of the joint batch, and resume after a kill."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rter.__main__ import main
from rter.attack import make_attack
from rter.data.load import load_data
from rter.distributed import Share
from rter.methods.step import Step
from rter.models.build import build_model
from rter.settings import make_config
from runs import assert_equal_to_rounding, assert_same_run

# The standard network, then RT-ER: two passes, each with AWP; ten steps, five of them exploring, of 150 and 151 rows.
SETTINGS = ["--method", "dual", "--epochs", "2", "--batch-size", "301", "--width", "4", "--attack-steps", "3", "--ema",
            "0.9", "--held-out", "60", "--eval-every", "1", "--awp-gamma", "0.005", "--awp-warmup", "0"]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in each process of torchrun: more threads would sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torchrun(run: Path, *options: str) -> subprocess.Popen[bytes]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen([*launch, "--max-restarts", "1", "-m", "rter", "train", "--out", run, *SETTINGS, *options])


def workers(launcher: subprocess.Popen[bytes]) -> list[int]:
    """The ids of the processes that torchrun has started, the first one's first."""
    children = Path(f"/proc/{launcher.pid}/task").glob("*/children")
    return sorted(int(pid) for listed in children for pid in listed.read_text().split())


def wait_for_state(launcher: subprocess.Popen[bytes], run: Path, since: int = 0) -> None:
    """Waits until a state is saved that is newer than `since`, in ns."""
    state = run / "resume.safetensors"
    while not (state.exists() and state.stat().st_mtime_ns > since):
        assert launcher.poll() is None
        time.sleep(0.001)


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes."""
    run = tmp_path_factory.mktemp("runs") / "joint"
    assert torchrun(run).wait() == 0
    return run


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, in which torchrun and both processes were killed between two steps."""
    run = tmp_path_factory.mktemp("runs") / "killed"
    launcher = torchrun(run, "--save-every", "0")
    wait_for_state(launcher, run)
    for pid in (*workers(launcher), launcher.pid):
        os.kill(pid, signal.SIGKILL)
    assert launcher.wait() == -signal.SIGKILL
    return run


def test_two_processes_equal_one_up_to_rounding(joint: Path, tmp_path: Path) -> None:
    assert main(["train", "--out", str(tmp_path / "alone"), *SETTINGS]) == 0
    assert_equal_to_rounding(joint, tmp_path / "alone", terms=8)


def test_resumes_bit_for_bit(joint: Path, killed: Path, tmp_path: Path) -> None:
    """After all processes were killed, and again after only the second was, upon which torchrun ends the first."""
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    launcher = torchrun(run, "--save-every", "0", "--resume")
    wait_for_state(launcher, run, since=(run / "resume.safetensors").stat().st_mtime_ns)
    os.kill(workers(launcher)[1], signal.SIGKILL)
    assert launcher.wait(timeout=120) == 0
    assert_same_run(run, joint)


def test_resumes_with_another_number_of_processes(
    joint: Path, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    for note in (f"rter: the run in {run} began with processes 2", ""):
        assert main(["train", "--out", str(run), "--resume"]) == 0
        assert capsys.readouterr().err.startswith(note)
    assert_equal_to_rounding(run, joint, terms=8)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("copies", [1, 2])
def test_a_share_draws_as_the_joint_batch_does(norm: str, copies: int) -> None:
    config = make_config(num_experts=3, width=2, norm=norm)
    data = load_data("digits", 60, 0)
    model, batch = build_model(config, data), data.train[:7]

    def draws(share: Share) -> tuple[torch.Tensor, torch.Tensor]:
        step = Step(model, config, 3, epoch=0, share=share)
        own = batch[share.start : share.stop]
        attack = make_attack(model, config, 0.2, 0, "attack", 3, share=share)
        start = attack(own.x.repeat(copies, 1, 1, 1), own.y.repeat(copies))
        route = step.own_route(own.x)
        assert route is not None
        return start.unflatten(0, (copies, len(own))), route.experts

    whole, parts = draws(Share.whole(7)), [draws(share) for share in (Share(0, 3, 7), Share(3, 7, 7))]
    assert torch.equal(torch.cat([start for start, _ in parts], dim=1), whole[0])
    assert torch.equal(torch.cat([route for _, route in parts]), whole[1])
