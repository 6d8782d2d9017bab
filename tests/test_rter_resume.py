"""A run that is killed at any moment, or meets a full disk, resumes to the same weights and metrics, bit for bit."""

import errno
import functools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rter.__main__ import main
from rter.checkpoint import open_run
from rter.config import Config
from rter.errors import UserError
from rter.journal import Journal
from rter.methods.update import update
from rter.settings import make_config
from rter.train import train
from runs import assert_same_run

TINY = {"num_experts": 2, "width": 2, "attack_steps": 1, "held_out": 60, "batch_size": 500, "epochs": 2}
CONFIG = make_config(method="standard", eval_every=1, **TINY)
MOMENTS = 38  # see count_writes, of a run of CONFIG that saves its state after each of its 6 steps


def flags(config: Config) -> list[str]:
    names = [*TINY, "method", "eval_every", "ema"]
    return [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train(CONFIG, run)
    return run


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that were printed; on a slow machine they include lines of progress."""
    return capsys.readouterr().err.splitlines()


class Killed(BaseException):
    """Stands for SIGKILL: nothing is cleaned up after it."""


def count_writes(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """Calls act(n) at the n-th moment between the steps of a write: before each fsync, before and after each rename."""
    moments = iter(range(1000))
    fsync, replace, unlink = os.fsync, Path.replace, Path.unlink
    killed = False

    def at_a_moment() -> None:
        nonlocal killed
        try:
            act(next(moments))
        except Killed:
            killed = True
            raise

    def watched_replace(path: Path, target: Path) -> None:
        at_a_moment()
        replace(path, target)
        at_a_moment()

    def watched_fsync(file: int) -> None:
        at_a_moment()
        fsync(file)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: killed or unlink(path, missing_ok))


def kill_at(n: int, config: Config, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(moment: int) -> None:
        if moment == n:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        count_writes(patch, kill)
        train(config, run, save_every=0)


@pytest.mark.parametrize("failure", [Killed, functools.partial(OSError, errno.ENOSPC, "No space left")])
def test_a_failure_at_any_moment_of_a_write(
    failure: Callable[[], BaseException], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_over = 0
    for n in range(0, MOMENTS, 4):

        def fail(moment: int, n: int = n) -> None:
            if moment == n:
                raise failure()

        run = tmp_path / str(n)
        with monkeypatch.context() as patch, pytest.raises((Killed, OSError)) as error:
            count_writes(patch, fail)
            train(CONFIG, run, save_every=0)
        left_over += any(path.name.startswith(".") for path in run.iterdir())
        if isinstance(error.value, OSError):
            assert str(run) in str(error.value)
        assert train(CONFIG, run, resume=True)
        assert_same_run(run, whole)
    assert (left_over > 5) == (failure is Killed)


def test_a_write_that_the_system_stops_halfway(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A write that fails halfway, as on a full disk, with nothing simulated."""
    run, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    kill_at(6, CONFIG, run, monkeypatch)  # after the config and one state
    state = run / "resume.safetensors"
    before = state.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        assert main(["train", "--out", str(run), "--resume", "--save-every", "0"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert lines_of(capsys)[-1] == f"rter: error: [Errno {errno.EFBIG}] File too large: '{state}'"
    assert state.read_bytes() == before and not any(path.name.startswith(".") for path in run.iterdir())
    assert train(CONFIG, run, resume=True)
    assert_same_run(run, whole)


def test_the_number_of_moments_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    count_writes(monkeypatch, seen.append)
    train(CONFIG, tmp_path / "run", save_every=0)
    assert len(seen) == MOMENTS


def test_a_killed_process_resumes(tmp_path: Path) -> None:
    """RT-ER with a running mean of the weights."""
    config = make_config(eval_every=2, ema=0.9, **(TINY | {"epochs": 5}))
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "rter",
        "train",
        "--out",
        str(run),
        *flags(config),
        "--save-every",
        "0",
        "--resume",
    ]
    process = subprocess.Popen(command)
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert main(command[3:]) == 0
    train(config, tmp_path / "whole")
    assert_same_run(run, tmp_path / "whole")


def test_mkl_uses_as_many_threads_as_torch(tmp_path: Path) -> None:
    """Else a new process rounds differently from one in which the number of threads was set."""
    script = f"""
import ctypes, pathlib, torch
from rter.config import Config
from rter.settings import make_config
from rter.train import train
config = make_config(method="standard", eval_every=1, epochs=0, num_experts=2, width=2, held_out=60)
train(config, pathlib.Path({str(tmp_path / "run")!r}))
library = ctypes.CDLL(torch.__path__[0] + "/lib/libtorch_cpu.so")
print("MKL adjusts threads:", getattr(library, "mkl_serv_get_dynamic", int)())
"""
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert out == "MKL adjusts threads: 0\n"


def test_changed_circumstances_are_reported(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, threads = tmp_path / "run", torch.get_num_threads()
    kill_at(6, CONFIG, run, monkeypatch)
    try:
        torch.set_num_threads(threads + 1)
        train(CONFIG, run, resume=True)
    finally:
        torch.set_num_threads(threads)
    said = (
        f"rter: the run in {run} began with threads {threads} and continues with threads {threads + 1}, so its weights "
        "will not be bit for bit those of an uninterrupted run"
    )
    assert lines_of(capsys).count(said) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd", "schedule": "cyclic", "cycle_steps": 2},
        {"optimizer": "sgd", "momentum": 0, "schedule": "multi-step", "drops": "1"},
        {"optimizer": "adam", "schedule": "cosine", "clip_norm": 0.5, "amp": "bf16"},
        {"schedule": "constant", "num_experts": 1, "method": "pgd-at", "ema": 0.5},
        {"method": "rt-er", "train_attack": "fgsm-pgi", "label_smoothing": 0.1, "ema": 0.5},
        {"method": "fast-at", "train_attack": "n-fgsm", "optimizer": "sgd", "ema": 0.9},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_optimiser_resumes(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(eval_every=2, **(TINY | {"lr": 0.01} | settings))
    train(config, tmp_path / "whole")
    kill_at(3 * 5, config, tmp_path / "run", monkeypatch)  # after the config and 4 states
    assert train(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_prints_the_command_to_resume(
    number: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C, or a job queue's warning, in the fourth of six steps, long before the state would be saved."""
    run, handlers = tmp_path / "run", [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        interrupt_step(4, [number], patch)
        assert main(["train", "--out", str(run), *flags(CONFIG)]) == 128 + number
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    *_, last = lines_of(capsys)
    said, _, command = last.partition("; to resume: ")
    assert said == "rter: stopped after step 4 of 6, saved"
    assert command == f"rter train --out {run} --resume" and main(command.split()[1:]) == 0
    assert_same_run(run, whole)


def test_a_second_signal_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    interrupt_step(2, [signal.SIGTERM, signal.SIGINT], monkeypatch)
    assert main(["train", "--out", str(run), *flags(CONFIG)]) == 130
    assert lines_of(capsys)[-2:] == ["rter: stopping after this step; a second signal stops at once", "rter: stopped"]
    assert not (run / "resume.safetensors").exists()


def interrupt_step(n: int, numbers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends the signals to this process in the middle of the n-th step."""
    steps = iter(range(1, 100))

    def interrupted(*args: Any) -> Any:
        if next(steps) == n:
            for number in numbers:
                os.kill(os.getpid(), number)
        return update(*args)

    monkeypatch.setattr("rter.train.update", interrupted)


def test_a_signal_to_an_evaluation_prints_the_command_to_resume(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    words = ["evaluate", str(run), "--suite", "quick", "--steps", "1", "--restarts", "2", "--images", "20"]
    part, parts = Journal.part, iter(range(100))

    def interrupted(*args: Any) -> Any:
        if next(parts) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return part(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "part", interrupted)
        assert main(words) == 128 + signal.SIGTERM
    assert lines_of(capsys)[-1] == f"rter: terminated; to resume: rter {' '.join(words)}"
    assert not (run / "report.json").exists() and (run / "evaluation.jsonl").stat().st_size > 0
    assert main(words) == 0


def test_progress_is_printed_without_a_terminal(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a minimum interval, there is a line for each step of training and each batch of each attack."""
    monkeypatch.setattr("rter.console.EVERY", 0.0)
    assert main(["train", "--out", str(tmp_path / "run"), *flags(CONFIG)]) == 0
    lines = capsys.readouterr().err.splitlines()
    steps = [line for line in lines if re.fullmatch(r"rter: run: step \d of 6, loss [\d.]+, [\d.e+]+ images/s.*", line)]
    assert all(float(re.findall(r"([\d.e+]+) images/s", line)[0]) < 1e7 for line in steps)
    assert len(steps) == 6 and re.search(r", done at (\d+-\d+-\d+ )?\d\d:\d\d$", steps[0])
    estimates = [line for line in lines if "an epoch of 3 steps takes about " in line and "what is left about" in line]
    epochs = [
        line for line in lines if re.fullmatch(r"rter: run: epoch \d of 2 took \d+ s, [\d.e+]+ images/s: .*", line)
    ]
    assert len(estimates) == 1 and len(epochs) == 2 and "loss" in epochs[0] and "sa" in epochs[1]
    assert len(lines) == 9
    words = ["evaluate", str(whole), "--suite", "quick", "--steps", "1", "--restarts", "1"]
    monkeypatch.setattr("rter.measured.Report.save", lambda *args: None)
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "rter: pgd: image 60 of 60" in said or "rter: pgd/0: image" in said, said


def test_an_incomplete_line_is_written_again(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    kill_at(15, CONFIG, run, monkeypatch)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "lo')
    train(CONFIG, run, resume=True)
    assert_same_run(run, whole)


def test_a_finished_run_says_so(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    assert main(["train", "--out", str(whole), "--resume"]) == 0
    assert f"finished already: {whole}" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in whole.iterdir()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lr 0.1", "lr must stay 0.015 for the run in {run}, got 0.1"),
        ("--epochs 3", "epochs must stay 2 for the run in {run}, got 3"),
        ("--save-every never", "must be a number of seconds, at least 0, got 'never'"),
    ],
)
def test_resume_refuses(flags: str, message: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(whole), "--resume", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message.format(run=whole) in error and error.count("\n") == 1


def test_a_damaged_state_is_named(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "resume.safetensors").write_bytes((whole / "resume.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"resume\.safetensors is damaged"):
        train(CONFIG, run, resume=True)


def test_lost_metrics_are_named(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    kill_at(33, CONFIG, run, monkeypatch)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: it holds 0 lines where the run's state says 1"):
        train(CONFIG, run, resume=True)


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        open_run(tmp_path / "run", CONFIG, resume=False),
        pytest.raises(UserError, match="is in use"),
        open_run(tmp_path / "run", CONFIG, resume=True),
    ):
        pass
