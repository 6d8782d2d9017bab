"""Weights in fp16 that are evaluated as a run, evaluations in folders of their own, and differences image by image."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rter import UserError, evaluate_model
from rter.__main__ import main
from rter.checkpoint import load_tensors, save_tensors
from rter.evaluate import TrainedRun
from rter.intervals import paired
from rter.models.classifier import DualClassifier
from rter.settings import make_config
from rter.train import train
from torch import Tensor

TINY: dict[str, Any] = {"num_experts": 2, "width": 2, "attack_steps": 1, "held_out": 60, "batch_size": 500, "epochs": 1}
WEAK = ["--steps", "2", "--restarts", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    train(make_config(method="pgd-at", model="resnet18", **TINY), folder)
    return folder


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def test_weights_in_fp16_are_evaluated_as_a_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("exported")
    assert main(["export", str(run), "--weights", "best", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    words = re.search(r"next: rter (.*)", said)
    assert words is not None and f"written: {out}/best.safetensors, 0.0" in said
    half, full = load_tensors(out / "best.safetensors"), load_tensors(run / "best.safetensors")
    assert half.keys() == full.keys()
    for name, tensor in full.items():
        assert torch.equal(half[name], tensor.half() if tensor.is_floating_point() else tensor)
    assert (out / "best.safetensors").stat().st_size < 0.6 * (run / "best.safetensors").stat().st_size
    assert "absolute" not in (out / "config.json").read_text()
    assert main([*words[1].replace(" DIR", " data").split(), "--suite", "pgd", *WEAK]) == 0
    assert main(["evaluate", str(run), "--weights", "best", "--suite", "pgd", *WEAK, "--out", "full"]) == 0
    exported, whole = report_of(out), report_of(Path("full"))
    assert (exported["weights_dtype"], whole["weights_dtype"]) == ("float16", "float32")
    assert abs(exported["sa"] - whole["sa"]) < 0.05 and exported["images"] == whole["images"]
    assert main(["report", str(out)]) == 0
    for kind in ("md", "html"):
        assert "with the best weights, stored in float16" in (out / f"report.{kind}").read_text()


def test_export_refuses(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "new")]) == 2
    assert "RUN must be a folder made by `rter train`" in capsys.readouterr().err
    assert main(["export", str(run), "--out", str(run)]) == 2
    assert "already exists" in capsys.readouterr().err
    weights = load_tensors(run / "last.safetensors")
    name = "moe.experts.bn1.running_var"
    other = tmp_path / "large"
    other.mkdir()
    (other / "config.json").write_bytes((run / "config.json").read_bytes())
    save_tensors(other / "last.safetensors", weights | {name: torch.full_like(weights[name], 7e4)})
    assert main(["export", str(other), "--out", str(tmp_path / "new")]) == 2
    assert f"{name} must be within fp16's range of 65504, got 7e+04" in capsys.readouterr().err
    assert main(["export", str(other), "--weights", "best", "--out", str(tmp_path / "new")]) == 2
    save_tensors(other / "last.safetensors", weights)  # beside no metrics.jsonl
    assert main(["export", str(other), "--out", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()


def test_an_exported_run_names_no_folder(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "started"
    shutil.copytree(run, other)
    settings = json.loads((run / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"init": "/home/me/net.pt", "data_dir": "/home/me/data"}))
    assert main(["export", str(other), "--out", str(tmp_path / "new")]) == 0
    settings = json.loads((tmp_path / "new" / "config.json").read_text())
    assert settings["init"] == "net.pt" and "/" not in "".join(map(str, settings.values()))


def test_an_exported_run_is_not_trained_over(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new"
    assert main(["export", str(run), "--out", str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert "holds an exported run, which cannot be resumed: give another folder" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_two_runs_become_a_dual_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    standard, out = tmp_path / "standard", tmp_path / "dual"
    train(make_config(method="standard", model="resnet18", **TINY), standard)
    words = ["export", str(run), "--standard", str(standard), "--dual-alpha", "0.25", "--out"]
    assert main([*words, str(out)]) == 0
    _, data, model = TrainedRun(out, data_dir=str(tmp_path)).load()
    assert isinstance(model, DualClassifier)
    x = data.test.x[:20]
    parts = [TrainedRun(folder).load()[2](x) for folder in (standard, run)]
    torch.testing.assert_close(model(x), 0.75 * parts[0] + 0.25 * parts[1], atol=0.02, rtol=0.02)  # weights in fp16
    assert main([*words[:4], "--dual-mix", "probabilities", "--out", str(tmp_path / "mixed")]) == 0
    mixed = TrainedRun(tmp_path / "mixed", data_dir=str(tmp_path)).load()[2]
    said, alpha = [part.softmax(1) for part in parts], mixed.alpha
    torch.testing.assert_close(mixed(x).exp(), (1 - alpha) * said[0] + alpha * said[1], atol=0.02, rtol=0.02)
    capsys.readouterr()
    assert main([*words[:4], "--out", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main([*words[:2], "--standard", str(out), "--out", str(tmp_path / "new")]) == 2
    assert "a dual model must be made of runs with one model each, got one of method dual" in capsys.readouterr().err
    assert main([*words[:5], "2", "--out", str(tmp_path / "new")]) == 2
    assert "--dual-alpha must be between 0 and 1, got 2" in capsys.readouterr().err
    assert main([*words[:2], "--dual-alpha", "0.5", "--out", str(tmp_path / "new")]) == 2
    assert "--dual-alpha must be given with --standard" in capsys.readouterr().err
    assert main([*words[:2], "--dual-mix", "logits", "--out", str(tmp_path / "new")]) == 2
    assert "--dual-mix must be given with --standard" in capsys.readouterr().err
    settings = json.loads((standard / "config.json").read_text())
    for other, message in {
        ("width", 3): "the width of RUN, 2, got 3",
        ("seed", 1): "the seed of RUN, 0, got 1",
    }.items():
        (standard / "config.json").write_text(json.dumps(settings | dict([other])))
        assert main([*words, str(tmp_path / "new")]) == 2
        assert f"--standard must be a run with {message}" in capsys.readouterr().err
    dense = tmp_path / "dense"
    train(make_config(method="pgd-at", model="resnet18", **TINY | {"num_experts": 1}), dense)
    assert main(["export", str(dense), "--standard", str(dense), "--out", str(tmp_path / "new")]) == 2
    assert "num_experts must be at least 2 for dual" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda t: t.fill_(math.nan), "must be finite, got nan"),
        (lambda t: t.fill_(-math.inf), "must be finite, got -inf"),
        (lambda t: t.long(), "must be torch.float32, got torch.int64"),
        (lambda t: t.to(torch.complex64), "must be torch.float32, got torch.complex64"),
    ],
)
def test_damaged_weights_are_not_evaluated(
    wrong: Callable[[Tensor], Tensor], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, name = tmp_path / "run", "moe.experts.bn1.running_var"
    assert main(["export", str(run), "--out", str(other)]) == 0
    weights = load_tensors(other / "last.safetensors")
    save_tensors(other / "last.safetensors", weights | {name: wrong(weights[name])})
    assert main(["evaluate", str(other), "--suite", "pgd", *WEAK]) == 2
    assert f"last.safetensors is damaged: {name} {message}" in capsys.readouterr().err


def test_an_evaluation_does_not_go_into_another_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    assert main(["evaluate", str(run), "--suite", "pgd", *WEAK, "--out", str(other)]) == 2
    message = f"out must not be the folder of another run, got {other}: give another folder"
    assert capsys.readouterr().err == f"rter: error: {message}\n"
    with pytest.raises(UserError, match=re.escape(message)):
        evaluate_model(torch.nn.Flatten(), torch.rand(2, 1, 8, 8), torch.zeros(2).long(), eps=0.1, out=other)
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    assert main(["evaluate", str(other), "--suite", "pgd", *WEAK, "--images", "10", "--out", str(other)]) == 0


def test_an_evaluation_in_a_folder_of_its_own(run: Path, tmp_path: Path) -> None:
    """A light evaluation of all images and a stronger one of some: neither overwrites the other or touches the run."""
    before = {path.name for path in run.iterdir()}
    assert main(["evaluate", str(run), "--suite", "pgd", *WEAK, "--out", str(tmp_path / "all")]) == 0
    some = [str(tmp_path / "some"), "--suite", "quick", *WEAK, "--images", "30"]
    assert main(["evaluate", str(run), "--out", *some]) == 0
    assert {path.name for path in run.iterdir()} == before
    everything, part = report_of(tmp_path / "all"), report_of(tmp_path / "some")
    assert everything["sample"] is None and part["sample"] == {"of": 60, "seed": 0} and part["run"] == str(run)
    assert everything["verdict"] == everything["ra"] and list(everything["attacks"]) == ["pgd"]
    assert everything["ra_e"] == [] and len(part["ra_e"]) == 2 and len(everything["expert_load"]) == 2
    assert [eps for eps, _ in everything["eps_curve"]] == [0, everything["eps"]]
    for name in ("all", "some"):
        assert main(["report", str(tmp_path / name)]) == 0
        assert f"--out {tmp_path / name}" in (tmp_path / name / "report.html").read_text()
        outcomes = load_tensors(tmp_path / name / "outcomes.safetensors")
        for figure in ("sa", "ra", "verdict"):
            assert outcomes[figure].double().mean().item() == report_of(tmp_path / name)[figure]


def test_differences_are_paired_image_by_image(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, weights, images in (("a", "last", "40"), ("b", "best", "40"), ("c", "best", "30")):
        words = ["--weights", weights, "--images", images, "--suite", "pgd", *WEAK, "--out", str(tmp_path / name)]
        assert main(["evaluate", str(run), *words]) == 0
    ours = load_tensors(tmp_path / "a" / "outcomes.safetensors")
    theirs = {name: flags.roll(5) for name, flags in ours.items()}  # another model's
    save_tensors(tmp_path / "b" / "outcomes.safetensors", theirs)
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert main(["report", *(str(tmp_path / name) for name in "abc"), "--out", str(page)]) == 0
    said = capsys.readouterr().out
    apart = [int((ours["sa"] & ~theirs["sa"]).sum()), int((~ours["sa"] & theirs["sa"]).sum())]
    assert apart[0] == apart[1] > 0
    _, low, high = paired(*apart, 40)
    for text in (said, page.read_text()):
        assert f"+0.000 [{low:+.3f}, {high:+.3f}]" in text and "a minus the row, image by image" in text
    assert "c is not paired with a: other images" in said


def test_the_paired_interval() -> None:
    """Computed by hand; mirrored when the models swap; narrower than the spread of the parts; and its level."""
    difference, low, high = paired(20, 8, 100)
    middle, reach = 12 / 102, 1.959964 * math.sqrt(29 - 144 / 102) / 102
    assert (difference, low, high) == pytest.approx((0.12, middle - reach, middle + reach))
    assert paired(8, 20, 100) == pytest.approx((-0.12, -high, -low))
    _, low, high = paired(0, 0, 50)
    assert -0.06 < low < 0 < high < 0.06
    generator, covered = torch.Generator().manual_seed(0), 0
    for cells in torch.multinomial(torch.tensor([0.12, 0.05, 0.83]).expand(2000, 3), 150, True, generator=generator):
        _, low, high = paired(int((cells == 0).sum()), int((cells == 1).sum()), 150)
        covered += low <= 0.07 <= high
    assert 0.935 <= covered / 2000 <= 0.97


def test_reports_without_outcomes_are_not_paired(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        words = ["--images", "20", "--suite", "pgd", *WEAK, "--out", str(tmp_path / name)]
        assert main(["evaluate", str(run), *words]) == 0
    (tmp_path / "b" / "outcomes.safetensors").unlink()
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "page.html")]) == 0
    assert "b is not paired with a: an evaluation that kept no outcomes" in capsys.readouterr().out
