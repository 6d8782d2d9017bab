"""The dual model and its curve over alpha."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rter import alpha
from rter.__main__ import main
from rter.alpha import alpha_curve, alpha_flags
from rter.data.split import Data, Split
from rter.methods.step import Step
from rter.models.build import build_model
from rter.models.classifier import DualClassifier
from rter.settings import make_config
from torch import Tensor, nn

from moe_kernels import Routing


@pytest.fixture
def batch() -> Split:
    return Split(torch.rand(8, 1, 6, 6), torch.randint(3, (8,)))


def dual(batch: Split, **settings: Any) -> DualClassifier:
    config = make_config(method="dual", num_experts=3, width=2, **settings)
    model = build_model(config, Data(batch, batch, 3))
    assert isinstance(model, DualClassifier)
    return model.eval()


def test_the_dual_model_mixes_logits_and_routes_as_the_robust_one(batch: Split) -> None:
    model = dual(batch, dual_alpha=0.3)
    standard, robust = model.standard(batch.x), model.robust(batch.x)
    torch.testing.assert_close(model(batch.x), 0.7 * standard + 0.3 * robust)
    route: Routing = model.route(batch.x, top_k=2)
    assert torch.equal(route.experts, model.robust.route(batch.x, top_k=2).experts) and model.num_experts == 3
    second = model.robust(batch.x, routing=route.select(1))
    torch.testing.assert_close(model(batch.x, routing=route.select(1)), 0.7 * standard + 0.3 * second)
    for model.alpha, alone in ((0.0, standard), (1.0, robust)):
        torch.testing.assert_close(model(batch.x), alone)


def test_a_mixture_of_probabilities_is_bounded(batch: Split) -> None:
    """Whatever F_S says, F_D predicts what F_R does if F_R's margin exceeds (1 - alpha) / alpha; also at the ends."""
    model = dual(batch, dual_alpha=0.7, dual_mix="probabilities")
    standard, robust = 1e4 * torch.randn(1000, 3), torch.randn(1000, 3)
    for model.alpha in (0.7, 0.0, 1.0):
        a = model.alpha
        expected = (1 - a) * standard.softmax(1) + a * robust.softmax(1)
        torch.testing.assert_close(model.mix(standard, robust).exp(), expected, atol=1e-6, rtol=1e-5)
    model.alpha = 0.7
    first, second = robust.softmax(1).topk(2).values.unbind(1)
    sure = first - second > 0.3 / 0.7
    kept = model.mix(standard, robust).argmax(1) == robust.argmax(1)
    assert kept[sure].all() and not kept[~sure].all() and 0 < sure.sum() < 1000
    leaf = standard.requires_grad_()
    (gradient,) = torch.autograd.grad(model.mix(leaf, robust).logsumexp(1).sum(), leaf)
    assert gradient.isfinite().all()


def test_the_robust_half_starts_as_the_same_seeds_rt_er(batch: Split) -> None:
    alone = build_model(make_config(method="rt-er", num_experts=3, width=2), Data(batch, batch, 3))
    model = dual(batch)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), model.robust.parameters(), strict=True))
    assert not torch.equal(model.standard.moe.router[1].weight, model.robust.moe.router[1].weight)


def test_the_attack_on_the_dual_model_leaves_both_halves_as_they_were(batch: Split) -> None:
    config = make_config(method="dual", num_experts=3, width=2)
    model = dual(batch).train()
    Step(model, config, 0, epoch=0).attack(model)(batch.x, batch.y)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_curve_counts_every_attack_and_measures_from_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """F_S is right on the four clean images; F_R is right on two, clean and attacked."""
    images = Split(torch.arange(4).double(), torch.tensor([0, 0, 0, 0]))

    class Fake(nn.Module):
        alpha = 0.25

    def predict(model: nn.Module, x: Tensor) -> Tensor:
        attacked = x >= 10
        if model.alpha == 0:
            return attacked.long()
        if model.alpha == 1:
            return (x % 10 >= 2).long()
        return (attacked & (x % 10 == 3)).long()

    monkeypatch.setattr(alpha, "ALPHAS", (0.0, 0.5, 1.0))
    model: Any = Fake()
    flags = alpha_flags(model, images.x, images.y, lambda model: images.x + 10 * (model.alpha == 0.5), predict)
    curve = alpha_curve(flags)
    assert model.alpha == 0.25
    assert [point[:3] for point in curve["points"]] == [[0, 1, 0], [0.5, 1, 0.75], [1, 0.5, 0.5]]
    # the line from (1, 0) to (0.5, 0.5); (1, 0.75) lies 0.75 / sqrt(2) beyond it
    assert [point[3] for point in curve["points"]] == pytest.approx([0, 0.75 / 2**0.5, 0])
    assert curve["above"] == curve["least"] == pytest.approx(0.75 / 2**0.5)
    assert curve["greatest"] == pytest.approx(0.5 / 2**0.5)  # (1, 0.5), were no RA above both ends'


def test_a_dual_run_reports_its_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alpha, "ALPHAS", (0.0, 0.7, 1.0))
    run = tmp_path / "dual"
    sizes = ["--epochs", "1", "--batch-size", "400", "--num-experts", "2", "--width", "2", "--held-out", "40"]
    assert main(["train", "--method", "dual", "--out", str(run), "--attack-steps", "1", *sizes]) == 0
    assert main(["evaluate", str(run), "--steps", "1", "--restarts", "1", "--queries", "20"]) == 0
    assert main(["report", str(run)]) == 0
    report = json.loads((run / "report.json").read_text())
    assert [point[0] for point in report["alpha_curve"]["points"]] == list(alpha.ALPHAS)
    assert "| alpha 0.7 " in (run / "report.md").read_text()
