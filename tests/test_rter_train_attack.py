"""Single-step training attacks, detection of catastrophic overfitting, label smoothing, defaults by data set."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rter.__main__ import main
from rter.checkpoint import load_tensors, read_json, read_lines
from rter.data import DEFAULTS
from rter.data.split import Data, Split
from rter.errors import UserError
from rter.methods.step import Step
from rter.models.build import build_model
from rter.settings import make_config
from rter.train import train
from rter.train_attacks import SINGLE_STEPS
from torch import Tensor
from torch.nn import functional as F

EPS = 0.1
TINY: dict[str, Any] = {"num_experts": 2, "width": 2, "attack_steps": 1, "held_out": 60, "batch_size": 500, "epochs": 2}


def a_step(attack: str, index: int = 0, **fields: Any) -> tuple[Step, Split]:
    images = Split(torch.rand(40, 1, 6, 5), torch.randint(3, (40,)))
    config = make_config(method="pgd-at", train_attack=attack, eps=EPS, width=2, num_experts=1, explore=0)
    return Step(build_model(config, Data(images, images, 3)), config, index, epoch=0, **fields), images


def slope(step: Step, x: Tensor, y: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(step.model(leaf), y), [leaf])[0].sign()


def drawn(step: Step, x: Tensor) -> Tensor:
    """Uniform in -1 to 1."""
    return torch.empty_like(x).uniform_(
        -1, 1, generator=torch.Generator().manual_seed(step.config.seed_for("attack", step.index))
    )


@pytest.mark.parametrize("attack", SINGLE_STEPS)
def test_a_single_step_follows_its_paper(attack: str) -> None:
    step, images = a_step(attack)
    x, y = images.x, images.y
    noise, length = {"fgsm-rs": (1, 1.25), "n-fgsm": (2, 1), "fgsm-pgi": (1, 1)}[attack]
    start = (x + noise * EPS * drawn(step, x)).clamp(0, 1)
    expected = start + length * EPS * slope(step, start, y)
    if attack != "n-fgsm":
        expected = x + (expected - x).clamp(-EPS, EPS)
    found = step.attack(step.model)(x, y)
    torch.testing.assert_close(found, expected.clamp(0, 1))
    assert (found - x).abs().max() > 2 * EPS if attack == "n-fgsm" else (found - x).abs().max() <= EPS
    assert found.min() >= 0 and found.max() <= 1


def test_fgsm_pgi_starts_at_the_last_batchs_perturbations() -> None:
    priors: dict[str, Tensor] = {}
    step, before = a_step("fgsm-pgi", priors=priors)
    first = step.attack(step.model)(before.x, before.y)
    torch.testing.assert_close(priors, {"attack": first - before.x})
    x, y = before.x.flip(0), before.y.flip(0)
    start = (x + first - before.x).clamp(0, 1)
    expected = x + (start + EPS * slope(step, start, y) - x).clamp(-EPS, EPS)
    found = Step(step.model, step.config, 1, epoch=0, priors=priors).attack(step.model)(x, y)
    torch.testing.assert_close(found, expected.clamp(0, 1))
    torch.testing.assert_close(priors["attack"], found - x)


def test_fgsm_pgi_starts_at_random_if_the_batch_has_another_shape() -> None:
    step, images = a_step("fgsm-pgi")
    expected = step.attack(step.model)(images.x, images.y)
    step.priors["attack"], step.found[:] = torch.zeros(7, 1, 6, 5), []
    assert torch.equal(step.attack(step.model)(images.x, images.y), expected)


@pytest.mark.parametrize("method", ["pgd-at", "trades", "mart", "rt-er", "dual", "jtdmoe"])
@pytest.mark.parametrize("attack", SINGLE_STEPS)
def test_every_attacking_method_trains_by_single_steps(method: str, attack: str, tmp_path: Path) -> None:
    settings = TINY | {"epochs": 1, "batch_size": 1000, "eps": EPS}
    train(make_config(method=method, train_attack=attack, **settings), tmp_path / "run")
    names = [name for name in load_tensors(tmp_path / "run" / "resume.safetensors") if name.startswith("priors/")]
    assert names == (["priors/attack"] if attack == "fgsm-pgi" else [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "standard", "train_attack": "n-fgsm"}, "train_attack must be pgd for standard, got n-fgsm"),
        ({"method": "advmoe", "train_attack": "fgsm-rs"}, "train_attack must be pgd for advmoe, got fgsm-rs"),
        (
            {"method": "nine-experts", "train_attack": "fgsm-rs"},
            "train_attack must be pgd for nine-experts, got fgsm-rs",
        ),
        (
            {"method": "fast-at", "train_attack": "pgd"},
            "train_attack must be fgsm-rs or n-fgsm or fgsm-pgi for fast-at",
        ),
        ({"train_attack": "fgsm-pgi", "norm": "L2"}, "norm must be Linf with train_attack fgsm-pgi, got L2"),
        ({"train_attack": "n-fgsm", "eps": 0.4}, "eps must be at most 1/3 with train_attack n-fgsm"),
        ({"train_attack": "ngfsm"}, "train_attack must be one of pgd, fgsm-rs, n-fgsm, fgsm-pgi, got 'ngfsm'"),
        ({"label_smoothing": 1}, "label_smoothing must be at least 0 and below 1, got 1.0"),
        ({"collapse": 2}, "collapse must be between 0 and 1, got 2.0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        make_config(**settings)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_data_set_smaller_than_a_batch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_size must be at most the number of training images, 400, got 500"):
        train(make_config(method="standard", train_images=400, **TINY), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fgsm_pgi_keeps_to_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rter.train.num_processes", lambda: 2)
    with pytest.raises(UserError, match="train_attack must not be fgsm-pgi with several processes"):
        train(make_config(method="fast-at", train_attack="fgsm-pgi", **TINY), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_defaults_of_a_data_set() -> None:
    """A setting that is given takes precedence over the data set's, and that over the method's."""
    digits, cifar10 = make_config(method="fast-at"), make_config(method="fast-at", data="cifar10", lr=0.1)
    assert (digits.model, digits.optimizer, digits.weight_decay, digits.lr) == ("small-conv", "adamw", 1, 0.015)
    assert {name: getattr(cifar10, name) for name in DEFAULTS["cifar10"]} == DEFAULTS["cifar10"] | {"lr": 0.1}
    assert cifar10.train_attack == digits.train_attack == "fgsm-rs"
    assert make_config(data="cifar10", faithful=True).explore == 0


def test_label_smoothing() -> None:
    step, images = a_step("pgd")
    logits = torch.randn(40, 3)
    assert step.cross_entropy(logits, images.y) == F.cross_entropy(logits, images.y)
    smooth = Step(step.model, make_config(label_smoothing=0.3), 0, epoch=0)
    target = 0.7 * F.one_hot(images.y, 3) + 0.1
    torch.testing.assert_close(smooth.cross_entropy(logits, images.y), -(target * logits.log_softmax(1)).sum(1).mean())


@pytest.fixture
def falling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the held-out accuracy under PGD alternate between 0.5 and 0.2, epoch by epoch."""
    found = iter([0.5, 0.2] * 3)
    monkeypatch.setattr("rter.train.quick_accuracies", lambda *args: {"sa": 0.6, "ra": next(found)})


def collapsing(**settings: Any) -> list[str]:
    settings = {"method": "fast-at", "eval_every": 1} | TINY | {"epochs": 4} | settings
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def test_a_run_that_collapses_stops(falling: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    message = (
        f"rter: error: the run in {run} collapsed in epoch 2 (catastrophic overfitting): accuracy under PGD on "
        "held-out images 0.200 after 0.500; best.safetensors is from before, and --train-attack n-fgsm or pgd, or a "
        "smaller --lr, may help\n"
    )
    for _ in range(2):  # it does not resume either
        assert main(["train", "--out", str(run), "--resume", *collapsing()]) == 2
        assert capsys.readouterr().err.endswith(message)
    assert [line.get("collapsed") for line in read_lines(run / "metrics.jsonl")] == [None, True]
    best, last = (load_tensors(run / f"{name}.safetensors") for name in ("best", "last"))
    assert any(not torch.equal(best[name], last[name]) for name in best)
    evaluate = ["evaluate", str(run), "--weights", "best", "--suite", "quick", "--steps", "1", "--restarts", "1"]
    assert main([*evaluate, "--images", "20"]) == 0
    said = "Training collapsed in epoch 2: catastrophic overfitting."
    assert said in capsys.readouterr().out and read_json(run / "report.json", {})["collapsed"] == 2
    assert main(["report", str(run)]) == 0
    assert all(said in (run / f"report.{kind}").read_text() for kind in ("md", "html"))


@pytest.mark.parametrize("settings", [{"collapse": 0}, {"collapse": 0.4}, {"method": "pgd-at"}])
def test_a_run_that_does_not_count_as_collapsed_goes_on(
    falling: None, settings: dict[str, Any], tmp_path: Path
) -> None:
    assert main(["train", "--out", str(tmp_path / "run"), *collapsing(**settings)]) == 0
    assert [line.get("collapsed") for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [None] * 4


def test_a_fall_by_chance_is_no_collapse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 60 images, 3, 1 and 0."""
    found = iter([3 / 60, 1 / 60, 0.0, 2 / 60])
    monkeypatch.setattr("rter.train.quick_accuracies", lambda *args: {"sa": 0.6, "ra": next(found)})
    assert main(["train", "--out", str(tmp_path / "run"), *collapsing()]) == 0
    assert [line.get("collapsed") for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [None] * 4


def test_a_collapse_in_the_last_epoch_is_reported(
    falling: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--out", str(tmp_path / "run"), *collapsing(epochs=2)]) == 0
    assert "collapsed in epoch 2" in capsys.readouterr().err
