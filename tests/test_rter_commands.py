"""The commands, end to end on the digits with a tiny model, and what they say to a user's mistake."""

import json
from pathlib import Path

import pytest
import torch
from rter.__main__ import main
from rter.checkpoint import load_tensors
from rter.config import Config
from rter.evaluate import evaluate

TINY = ["--epochs", "2", "--batch-size", "400", "--num-experts", "2", "--width", "2", "--attack-steps", "1",
        "--held-out", "60", "--eval-every", "1"]  # fmt: skip
WEAK = ["--suite", "quick", "--steps", "2", "--restarts", "2"]
FIXED_KEYS = {"sa", "ra", "ra_e", "ra_r", "aa", "expert_load", "route_flip_rate", "eps", "method", "data", "seed",
              "baselines"}  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "demo"
    assert main(["demo", "--out", str(out), *TINY, *WEAK]) == 0
    return out


def test_a_run_holds_its_files(demo: Path) -> None:
    run = demo / "rt-er"
    assert {path.name for path in run.iterdir()} == {
        "config.json", "metrics.jsonl", "metrics.csv", "last.safetensors", "best.safetensors", "resume.safetensors",
        "report.json", "report.md", "examples.safetensors", "plots",
    }  # fmt: skip
    plots = {path.name for path in (run / "plots").iterdir()}
    assert plots == {"accuracy.png", "learning.png", "experts.png", "images.png"}
    text = (run / "report.md").read_text()
    assert all(f"plots/{plot}" in text for plot in plots) and "| standard" in text
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in epochs] == [1, 2]
    assert {"loss", "adversarial", "kl", "clean_second", "balance", "seconds", "sa", "ra"} <= epochs[1].keys()


def test_the_report_has_its_keys(demo: Path) -> None:
    report = json.loads((demo / "rt-er" / "report.json").read_text())
    assert report.keys() >= FIXED_KEYS
    assert (report["method"], report["data"], report["seed"], report["eps"]) == ("rt-er", "digits", 0, 0.2)
    assert len(report["ra_e"]) == len(report["expert_load"]) == 2 and report["aa"] is None
    assert sum(report["expert_load"]) == pytest.approx(1)
    assert report["verdict"] <= min(report["attacks"].values()) <= report["ra"] <= report["sa"]
    assert report["attacks"][report["worst_attack"]] == min(report["attacks"].values())
    curve = [accuracy for _, accuracy in report["eps_curve"]]
    assert curve == sorted(curve, reverse=True) and curve[0] == report["sa"]
    assert report["baselines"]["standard"]["method"] == "standard"


def test_training_repeats_itself_bitwise(demo: Path, tmp_path: Path) -> None:
    assert main(["train", "--config", str(demo / "rt-er" / "config.json"), "--out", str(tmp_path / "again")]) == 0
    first, again = (load_tensors(run / "last.safetensors") for run in (demo / "rt-er", tmp_path / "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_evaluation_repeats_itself_and_takes_the_best_weights(demo: Path) -> None:
    before = json.loads((demo / "standard" / "report.json").read_text())
    assert evaluate(demo / "standard", "last", 2, 2, "quick") == {
        **before,
        "eps_curve": [tuple(p) for p in before["eps_curve"]],
    }
    assert main(["evaluate", str(demo / "standard"), "--weights", "best", *WEAK]) == 0
    assert json.loads((demo / "standard" / "report.json").read_text())["weights"] == "best"


def test_a_dense_run(tmp_path: Path) -> None:
    run = tmp_path / "dense"
    options = [*TINY, "--num-experts", "1", "--epochs", "1", "--method", "pgd-at"]
    assert main(["train", "--out", str(run), *options]) == 0
    assert main(["evaluate", str(run), *WEAK]) == 0
    assert main(["report", str(run)]) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["ra_r"] is None and report["expert_load"] == [1.0] and report["route_flip_rate"] == 0
    assert not (run / "plots" / "experts.png").exists()


def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "--out", str(tmp_path), "--seeds", "0", "1", *TINY[2:], "--epochs", "1", *WEAK]
    command += ["--equal-time", "--methods", "rt-er", "standard", "pgd-at", "dense-pgd-at"]
    assert main(command) == 0
    rows = json.loads((tmp_path / "methods.json").read_text())["rows"]
    assert list(rows)[:4] == ["rt-er", "standard", "pgd-at", "dense pgd-at"] and len(rows) == 6
    assert rows["rt-er"]["RA"].keys() == {"mean", "deviation"} and rows["dense pgd-at"]["RA-R"] is None
    trained = (tmp_path / "rt-er-0" / "last.safetensors").stat().st_mtime_ns
    assert main(command) == 0
    assert trained == (tmp_path / "rt-er-0" / "last.safetensors").stat().st_mtime_ns
    assert main([*command, "--beta", "3"]) == 2
    assert "with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "required: COMMAND"),
        ("fly", "invalid choice: 'fly'"),
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
        ("evaluate {full}", "RUN must be a folder made by `rter train`, and {full} holds no config.json"),
        ("sweep --out {new} --methods magic", "--methods must be among standard, pgd-at, "),
        ("evaluate {full} --steps 0", "must be a whole number above 0, got '0'"),
        ("evaluate {full} --weights first", "invalid choice: 'first'"),
        ("report {full}", "{full} holds no report.json: run `rter evaluate {full}` first"),
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


def test_a_run_is_not_overwritten(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(demo / "rt-er")]) == 2
    assert f"--out {demo / 'rt-er'} already holds a run: give another folder" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["train", "--out", str(tmp_path / "file" / "run")]) == 2
    error = capsys.readouterr().err
    assert "Not a directory" in error and error.count("\n") == 1


def test_weights_that_do_not_fit_are_one_line(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(Config(width=3).to_json())
    (tmp_path / "last.safetensors").write_bytes((demo / "rt-er" / "last.safetensors").read_bytes())
    assert main(["evaluate", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "does not fit the run's config.json" in error and error.count("\n") == 1
