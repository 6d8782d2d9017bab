"""What the commands say of a user's mistakes and of damaged files: one line each, and nothing is lost."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rter.__main__ import main
from rter.settings import make_config
from runs import WEAK


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "required: COMMAND"),
        ("fly", "invalid choice: 'fly'"),
        ("trian", "did you mean train? (see `rter --help`)"),
        ("train --nun-experts 3 --out {new}", "--nun-experts 3: did you mean --num-experts? (see `rter train --help`)"),
        ("evaluate {full} --restarts 0", "must be a whole number above 0"),
        ("evaluate {full} --restart 1", "unrecognized arguments: --restart 1: did you mean --restarts?"),
        ("train --eps 8/255 --alpha 2/255 --out {new}", "--alpha 2/255: did you mean --alpha-ratio?"),
        ("evaluate {full} --imagse=3", "unrecognized arguments: --imagse=3: did you mean --images?"),
        ("data fetch cifar", "did you mean cifar10?"),
        ("train --method RTER --out {new}", "got 'RTER': did you mean rt-er?"),
        ("train --gate softmx --out {new}", "got 'softmx': did you mean softmax?"),
        ("sweep --out {new} --methods pgd", "got 'pgd': did you mean pgd-at?"),
        ("train --num-experts 1 --out {new}", "got 1: one dense network is --method pgd-at --num-experts 1"),
        (
            "train --num-experts 100000000 --out {new}",
            "num_experts, width and depth must give a model that fits the memory",
        ),
        ("train --width 100000000 --out {new}", "num_experts, width and depth must give a model that fits"),
        ("train --num-experts 2147483647 --width 2147483647 --out {new}", "a model that fits the memory"),
        ("train --num-experts 99999999999 --out {new}", "num_experts must be below 2^31, got 99999999999"),
        ("train --seed 99999999999999999999 --out {new}", "seed must be below 2^63, got 99999999999999999999"),
        ("train --alpha-ratio 8 --out {new}", "alpha_ratio must be at most 2: it is relative to eps"),
        ("train --drops ² --schedule multi-step --out {new}", "drops must be numbers below epochs"),
        ("train --device gpu --out {new}", "device must be cpu, cuda or cuda:N, got 'gpu'"),
        ("train --device cuda:99 --out {new}", " finds, here cpu"),
        ("train --train-images -1 --out {new}", "train_images must be at least 0, got -1"),
        ("train --train-images 9999 --out {new}", "train_images must be 0 to 1437 besides those held out, got 9999"),
        ("evaluate {full} --steps ²", "must be a whole number above 0, got '²'"),
        (
            "train --data image-folder --data-dir {new} --out {new}",
            "--data-dir {new} must hold a folder of images for each class, but is not a folder",
        ),
        ("train --method magic --out {new}", "method must be one of standard, pgd-at, trades, "),
        ("train --data letters --out {new}", "data must be one of digits, cifar10, svhn"),
        ("train --eps -1 --out {new}", "eps must be above 0, got -1.0"),
        ("train --eps wide --out {new}", "eps must be a finite number, got 'wide'"),
        ("train --held-out 4000 --out {new}", "held_out must be between 1 and 1796"),
        ("train --no-such-flag 3 --out {new}", "unrecognized arguments: --no-such-flag"),
        ("train", "required: --out"),
        ("train --out {full}", "--out {full} already exists and is not an empty folder"),
        ("train --out {file}", "--out {file} already exists and is not an empty folder"),
        ("train --config {new} --out {new}", "cannot read {new}: No such file or directory"),
        ("evaluate {full}", "RUN must be a folder made by `rter train`, but {full} holds no config.json"),
        ("evaluate {new} --out {full}", "RUN must be a folder, but {new} does not exist"),
        ("sweep --out {new} --methods magic", "--methods must be among rt-er, standard, "),
        ("evaluate {full} --steps 0", "must be a whole number above 0, got '0'"),
        ("evaluate {full} --weights first", "--weights must be last or best for a RUN, got 'first'"),
        ("report {full}", "{full} holds no report.json: run `rter evaluate {full}` first"),
        ("report {new}", "RUN must be a folder, but {new} does not exist"),
        ("report {file} --baselines {full}", "RUN must be a folder, but {file} is a file"),
        ("evaluate {new}", "RUN must be a folder, but {new} does not exist"),
    ],
)
def test_a_mistake_is_one_line(command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = {name: tmp_path / name for name in ("new", "full", "file")}
    places["full"].mkdir()
    (places["full"] / "notes.txt").write_text("mine")
    places["file"].write_text("mine")
    assert main(command.format(**places).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("rter: error: ") and error.count("\n") == 1 and message.format(**places) in error
    assert not places["new"].exists()


def test_running_out_of_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhaust(*args: Any, **kwargs: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr("rter.train.train", exhaust)
    assert main(["train", "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rter: error: out of memory: num_experts, width, ") and error.count("\n") == 1


DAMAGED: list[tuple[str, Any, str]] = [
    ("config.json", b"", "config.json must be a JSON file"),
    ("config.json", b"\xff\xfe{", "cannot read {run}/config.json: 'utf-8' codec"),
    ("config.json", b"[" * 100_000, "config.json must be a JSON file"),
    ("report.json", b"", "report.json is damaged: Expecting value"),
    ("report.json", b'{"sa": 1', "report.json is damaged: "),
    ("report.json", b"[]", "report.json is damaged: the file must be an object, got []"),
    ("report.json", b"{}", "report.json is damaged: the file must hold 'method', which is missing"),
    ("report.json", {"sa": "much"}, "report.json is damaged: the file['sa'] must be a number, got 'much'"),
    ("report.json", {"sa": True}, "report.json is damaged: the file['sa'] must be a number, got True"),
    ("report.json", {"ra_e": [0.5, None]}, "the file['ra_e'][1] must be a number, got None"),
    ("report.json", {"checks": {"a": {}}}, "the file['checks']['a'] must hold 'passed', which is missing"),
    ("report.json", {"baselines": {"b": {}}}, "the file['baselines']['b'] must hold 'method', which is missing"),
    ("metrics.jsonl", b'{"epoch": 1\n{"epoch": 2, "loss": 1.0, "seconds": 2}\n', "metrics.jsonl is damaged: line 1: "),
    ("metrics.jsonl", b"\xff\n", "metrics.jsonl is damaged: line 1: "),
    ("metrics.jsonl", b'{"epoch": 1}\n', "metrics.jsonl is damaged: line 1 must hold 'loss', which is missing"),
    ("metrics.jsonl", b"3\n", "metrics.jsonl is damaged: line 1 must be an object, got 3"),
    ("examples.safetensors", b"", "examples.safetensors is damaged: "),
    ("examples.safetensors", "last.safetensors", "examples.safetensors is damaged: it holds no adversarial, clean, "),
    ("last.safetensors", b"", "last.safetensors is damaged: "),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED)
def test_a_damaged_file_of_a_run_is_named(
    name: str, content: Any, message: str, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(demo / "rt-er", run)
    if isinstance(content, dict):
        content = json.dumps(json.loads((run / name).read_text()) | content).encode()
    (run / name).write_bytes((run / content).read_bytes() if isinstance(content, str) else content)
    commands = [["report", str(run)], ["evaluate", str(run), *WEAK]]
    reads = {"report.json": commands[:1], "examples.safetensors": commands[:1], "metrics.jsonl": commands}
    for command in reads.get(name, commands[1:]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("rter: error: ") and error.count("\n") == 1 and message.format(run=run) in error


@pytest.mark.parametrize(("name", "command"), [("methods.json", "report"), ("equal-time.json", "sweep")])
def test_a_damaged_file_of_a_sweep_is_named(
    name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--equal-time", "--methods", "rt-er", "--out"] if command == "sweep" else []
    for content in ("", "[3]", '{"seeds": [0], "rows": {}}', '{"rt-er": {}, "seeds": [0], "rows": {}, "a": 3}'):
        (tmp_path / name).write_text(content)
        assert main([command, *options, str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"rter: error: {tmp_path / name} is damaged: ") and error.count("\n") == 1


def test_an_incomplete_last_line_is_ignored(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A kill leaves half a line of an epoch: the run is evaluated and reported as it was before that epoch."""
    run = tmp_path / "run"
    shutil.copytree(demo / "rt-er", run)
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole[:-9])
    (run / "report.json").unlink()  # of the whole run, which would not be evaluated again
    for command in (["evaluate", str(run), *WEAK], ["report", str(run)]):
        assert main(command) == 0
        assert f"skipped the incomplete last line of {run / 'metrics.jsonl'}" in capsys.readouterr().err
    report = json.loads((run / "report.json").read_text())
    assert report["train_seconds"] == json.loads(whole.splitlines()[0])["seconds"]


def test_a_run_is_not_overwritten(
    demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are images read first, which may take minutes."""
    monkeypatch.setattr("rter.train.load_data", lambda *args: pytest.fail("images were read"))
    assert main(["train", "--out", str(demo / "rt-er")]) == 2
    assert f"--out {demo / 'rt-er'} already holds a run: give another folder" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["train", "--out", str(tmp_path / "file" / "run")]) == 2
    error = capsys.readouterr().err
    assert "Not a directory" in error and error.count("\n") == 1


def test_weights_that_do_not_fit_are_one_line(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(make_config(width=3).to_json())
    (tmp_path / "last.safetensors").write_bytes((demo / "rt-er" / "last.safetensors").read_bytes())
    assert main(["evaluate", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "does not fit the run's config.json" in error and error.count("\n") == 1
