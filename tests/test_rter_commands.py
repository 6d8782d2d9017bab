"""The commands, end to end on the digits with a tiny model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rter.__main__ import main
from rter.checkpoint import load_tensors, write_json
from rter.comparison import write_comparison
from rter.evaluate import TrainedRun, evaluate
from rter.plots import images, learning
from rter.strength import Effort
from rter.wording import counted, distance, verdict
from runs import TINY, WEAK

FIXED_KEYS = {"sa", "ra", "ra_e", "ra_r", "aa", "expert_load", "route_flip_rate", "eps", "method", "data", "seed",
              "baselines"}  # fmt: skip


def test_a_run_has_its_files(demo: Path) -> None:
    run = demo / "rt-er"
    assert {path.name for path in run.iterdir()} == {
        "config.json", "metrics.jsonl", "metrics.csv", "last.safetensors", "best.safetensors", "resume.safetensors",
        "report.json", "report.md", "report.html", "examples.safetensors", "outcomes.safetensors", "plots",
    }  # fmt: skip
    plots = {path.name for path in (run / "plots").iterdir()}
    assert plots == {"accuracy.png", "learning.png", "experts.png", "images.png"}
    text = (run / "report.md").read_text()
    assert all(f"plots/{plot}" in text for plot in plots) and "| standard" in text
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in epochs] == [1, 2]
    assert {"loss", "adversarial", "kl", "clean_second", "balance", "seconds", "sa", "ra"} <= epochs[1].keys()


def test_learning_curves_of_methods_with_phases() -> None:
    """The nine-experts loss has different terms in each phase; each is plotted over the epochs that have it."""
    apart = {"epoch": 1, "loss": 3.0, "benign": 1.0, "fgsm": 1.0, "pgd": 1.0}
    joint = {"loss": 2.0, "clean": 1.0, "adversarial": 1.0, "sa": 1.0, "ra": 0.5}
    figure = learning([apart, {"epoch": 2, **joint}, {"epoch": 3, **joint}])
    drawn = {line.get_label(): list(line.get_xdata()) for line in figure.axes[1].get_lines()}
    assert drawn == {"loss": [1, 2, 3], "benign": [1], "fgsm": [1], "pgd": [1], "clean": [2, 3], "adversarial": [2, 3]}


def test_pictures_name_what_the_model_reads() -> None:
    """A model from elsewhere may have more classes than the data have names, and a name may hold a formula."""
    pixels, label = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    examples = {"x": pixels, "x_adv": pixels, "label": label, "clean": label, "adversarial": torch.tensor([1, 15])}
    figure = images({"classes": ["cat", "$x_$"], "norm": "Linf", "eps": 0.1}, examples)
    figure.canvas.draw()
    said = [axes.get_xlabel() for axes in figure.axes]
    assert said == ["cat ✓", "$x_$ ✓", "", "", "$x_$ ✗", "15 ✗"]


def test_the_report_has_its_keys(demo: Path) -> None:
    report = json.loads((demo / "rt-er" / "report.json").read_text())
    assert report.keys() >= FIXED_KEYS
    assert (report["method"], report["data"], report["seed"], report["eps"]) == ("rt-er", "digits", 0, 0.2)
    assert len(report["ra_e"]) == len(report["expert_load"]) == 2 and report["aa"] is None
    assert sum(report["expert_load"]) == pytest.approx(1)
    assert report["verdict"] <= min(report["attacks"].values()) <= report["ra"] <= report["sa"]
    results = {result["name"]: result for result in report["attack_results"]}
    assert {name: result["accuracy"] for name, result in results.items()} == report["attacks"]
    assert report["worst_attack"] in results and results["pgd"]["attacked"] == round(60 * report["sa"])
    assert sum(result["new"] for result in results.values()) == round(60 * (report["sa"] - report["verdict"]))
    curve = [accuracy for _, accuracy in report["eps_curve"]]
    assert curve == sorted(curve, reverse=True) and curve[0] == report["sa"]
    assert report["baselines"]["standard"]["method"] == "standard"


def test_training_repeats_itself_bitwise(demo: Path, tmp_path: Path) -> None:
    assert main(["train", "--config", str(demo / "rt-er" / "config.json"), "--out", str(tmp_path / "again")]) == 0
    first, again = (load_tensors(run / "last.safetensors") for run in (demo / "rt-er", tmp_path / "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_evaluation_repeats_itself_and_takes_the_best_weights(demo: Path) -> None:
    before = json.loads((demo / "standard" / "report.json").read_text())
    (demo / "standard" / "report.json").unlink()
    after = evaluate(TrainedRun(demo / "standard"), Effort("quick", 2, 2))
    for report in (before, after):
        for result in report["attack_results"]:
            result["seconds"] = 0
    assert before == after
    assert main(["evaluate", str(demo / "standard"), "--weights", "best", *WEAK]) == 0
    assert json.loads((demo / "standard" / "report.json").read_text())["weights"] == "best"


def test_a_finished_evaluation_is_not_computed_again(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is shown, until the weights, the images or the attacks are others."""
    file = demo / "rt-er" / "report.json"
    before, measured = file.read_bytes(), []
    monkeypatch.setattr("rter.evaluate.measure", lambda evaluation: measured.append(evaluation) or json.loads(before))
    assert main(["evaluate", str(demo / "rt-er"), *WEAK]) == 0
    said = capsys.readouterr()
    wanted = f"rter: evaluated already, with the same weights, images and attacks: remove {file} to measure again\n"
    assert said.err == wanted and said.out.startswith("| run ") and file.read_bytes() == before and not measured
    assert not (demo / "rt-er" / "evaluation.jsonl").exists()
    for others in (["--images", "30"], ["--steps", "3"], ["--weights", "best"]):
        assert main(["evaluate", str(demo / "rt-er"), *WEAK, *others]) == 0
        file.write_bytes(before)
    assert len(measured) == 3 and "evaluated already" not in capsys.readouterr().err


def test_a_verdict_names_the_attack_that_broke_most() -> None:
    report = {"verdict": 0.597, "intervals": {"verdict": [0.574, 0.62]}, "suite": "quick", "ra": 0.606, "aa": None,
              "worst_attack": "apgd-ce", "checks": {}}  # fmt: skip
    end = "PGD alone leaves 60.6%. Of what PGD leaves, apgd-ce breaks the most. All checks passed."
    assert verdict(report).endswith(end)  # 9 of 1089 images, far from most of them
    assert [counted(n, "expert") for n in (0, 1, 2)] == ["no experts", "1 expert", "2 experts"]
    assert [distance(eps) for eps in (0.2, 8 / 255, 1 / 7, 2 / 3, 100.2)] == [
        "0.2",
        "8/255",
        "0.1429",
        "0.6667",
        "100.2",
    ]


def test_a_sample_of_the_images_is_named(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(demo / "standard", run)
    assert main(["evaluate", str(run), *WEAK, "--images", "61"]) == 2
    assert "rter: error: images must be at most 60, all that there are to measure on, got 61" in capsys.readouterr().err
    assert (
        main(["evaluate", str(run), *WEAK, "--restarts", "1", "--images", "20"]) == 0
        and main(["report", str(run)]) == 0
    )
    report = json.loads((run / "report.json").read_text())
    assert report["held_out"] == 20 and report["sample"] == {"of": 60, "seed": 0} and report["split"] == "held-out"
    text = (run / "report.md").read_text()
    assert "2 experts, 2 epochs, Linf" in text and ", 1 restart on the whole model" in text
    assert "Measured on 20 of the 60 held-out images (drawn by seed 0 in the proportions of the classes) with" in text
    labels = load_tensors(run / "examples.safetensors")["label"]
    assert len(labels) > 5  # not only the first classes
    write_json(run / "report.json", report | {"split": "test", "sample": None})
    assert main(["report", str(run)]) == 0
    text = (run / "report.md").read_text()
    assert "Measured on 20 test images with" in text and "20 held-out" not in text


def test_a_dense_run(tmp_path: Path) -> None:
    run = tmp_path / "dense"
    options = [*TINY, "--num-experts", "1", "--epochs", "1", "--method", "pgd-at", "--device", "cpu", "--train-images",
               "500"]  # fmt: skip
    assert main(["train", "--out", str(run), *options]) == 0
    assert main(["evaluate", str(run), *WEAK]) == 0
    assert main(["report", str(run)]) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["ra_r"] is None and report["expert_load"] == [1.0] and report["route_flip_rate"] == 0
    assert not (run / "plots" / "experts.png").exists()


def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "--out", str(tmp_path), "--seeds", "0", "1", *TINY[2:], "--epochs", "1", *WEAK]
    command += ["--methods", "rt-er", "standard", "dense-pgd-at"]
    assert main(command) == 0
    figures = json.loads((tmp_path / "methods.json").read_text())
    rows = figures["rows"]
    assert list(rows) == ["rt-er", "standard", "dense pgd-at"] and figures["seeds"] == [0, 1]
    assert len(rows["rt-er"]["RA"]) == 2 and rows["dense pgd-at"]["RA-R"] == [None, None]
    trained = (tmp_path / "rt-er-0" / "last.safetensors").stat().st_mtime_ns
    assert main(command) == 0
    assert trained == (tmp_path / "rt-er-0" / "last.safetensors").stat().st_mtime_ns
    text = (tmp_path / "methods.md").read_text()
    (tmp_path / "methods.md").unlink()
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 0
    assert text == (tmp_path / "methods.md").read_text() and text in capsys.readouterr().out
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--beta", "3"]) == 2
    assert "with other settings" in capsys.readouterr().err


def test_a_sweep_at_equal_time_in_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "--out", str(tmp_path), "--seeds", "3", *TINY[2:], "--epochs", "2", *WEAK]
    command += ["--equal-time", "--jobs", "2", "--methods"]
    assert main([*command, "rt-er", "standard"]) == 0
    kept = json.loads((tmp_path / "equal-time.json").read_text())
    ratio = kept["rt-er"]["seconds per step"] / kept["standard"]["seconds per step"]
    assert kept["rt-er"]["epochs"] == 2 and kept["standard"]["epochs"] == max(1, round(2 * ratio))
    assert len((tmp_path / "standard-3" / "metrics.jsonl").read_text().splitlines()) == kept["standard"]["epochs"]
    assert f"Epochs: rt-er 2, standard {kept['standard']['epochs']}." in (tmp_path / "methods.md").read_text()
    assert main([*command, "standard"]) == 2
    assert "--methods must include rt-er with --equal-time" in capsys.readouterr().err
    assert main([*command, "rt-er", "--epochs", "0"]) == 2
    assert "epochs must be above 0 with --equal-time, got 0" in capsys.readouterr().err


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """Computed by hand: differences 0.1, 0.2, 0.3 have mean 0.2, standard error 0.1 / sqrt(3), t(0.975, 2) = 4.303."""
    row = {key: [0.5, 0.6, 0.7] for key in ("SA", "RA", "AA", "verdict")}
    rows = {"a": row, "b": {**row, "RA": [0.4, 0.4, 0.4], "AA": [None, None, None]}}
    write_json(tmp_path / "methods.json", {"seeds": [0, 1, 2], "equal_time_epochs": {}, "rows": rows})
    text = write_comparison(tmp_path / "methods").read_text()
    assert "0.600 ± 0.100" in text and "+0.200 [-0.048, +0.448]" in text
    assert "| b   | +0.000 [+0.000, +0.000] |" in text


def test_data_are_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained with a relative path, evaluated from another folder, and again after the data have moved."""
    for at in ("here", "there"):
        (tmp_path / at).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["data", "make-cifar-digits", "--data-dir", "data"]) == 0
    train = ["train", "--data", "cifar10", "--out", "run", *TINY, "--epochs", "1", "--method", "standard"]
    assert main(train) == 0
    config = (tmp_path / "here" / "run" / "config.json").read_text()
    assert '"data_dir": "data"' in config and f'"data_dir_absolute": "{tmp_path}/here/data"' in config
    monkeypatch.chdir(tmp_path / "there")
    run = ["../here/run", *WEAK, "--images", "5"]
    assert main(["evaluate", *run]) == 0
    assert main(["train", "--config", "../here/run/config.json", "--epochs", "0", "--out", "again"]) == 0
    (tmp_path / "here" / "data").rename(tmp_path / "moved")
    capsys.readouterr()
    assert main(["evaluate", *run]) == 2
    error = capsys.readouterr().err
    assert (
        "data/cifar-10-batches-bin/data_batch_1.bin does not exist" in error
        and "say with --data-dir where it is" in error
    )
    assert main(["evaluate", *run, "--data-dir", "../moved"]) == 0
    assert main(["train", "--resume", "--out", "../here/run", "--data-dir", "../moved"]) == 0
    assert (tmp_path / "here" / "run" / "config.json").read_text() == config
    (tmp_path / "moved").rename(tmp_path / "there" / "data")  # as it was given, from here
    assert main(["evaluate", *run]) == 0
