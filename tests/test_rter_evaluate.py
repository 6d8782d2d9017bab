"""Evaluations: the union of attacks, certificates against closed forms, and checks on models that mask gradients."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from rter.autoattack import auto_attack
from rter.certificate import affine_router, paper_certificate, route_radius
from rter.config import Config
from rter.data.split import Split
from rter.evaluate import examples, measure, strength_of
from rter.evaluation import Evaluation
from rter.intervals import wilson
from rter.models.classifier import DualClassifier, Normalize, RobustClassifier
from rter.plots import accuracy
from rter.sanity import Seen, sanity
from rter.settings import make_config
from rter.suite import apgd_attacks, is_deterministic
from rter.wording import verdict
from torch import Tensor, nn

from moe_kernels import RobustMoE
from moe_kernels.attacks import APGD


def classifier(
    num_experts: int = 3, top_k: int = 1, gate: str = "straight_through", classes: int = 5
) -> tuple[RobustClassifier, Split]:
    images = torch.rand(12, 1, 6, 6)
    experts = [nn.Sequential(nn.Flatten(), nn.Linear(36, classes)) for _ in range(num_experts)]
    router = nn.Sequential(nn.Flatten(), nn.Linear(36, num_experts))
    model = RobustClassifier(Normalize(images), RobustMoE.from_experts(experts, router, top_k, gate)).eval()
    with torch.no_grad():
        return model, Split(images, model(images).argmax(1))


def config(**settings: Any) -> Config:
    return make_config(**({"method": "pgd-at", "eps": 0.02} | settings))


def evaluation(model: nn.Module, images: Split, **options: Any) -> Evaluation:
    return Evaluation(model, images, strength_of(config(), **{"steps": 3, "queries": 20} | options))


@pytest.mark.parametrize("kind", ["one expert", "soft", "dual"])
def test_every_kind_of_model_is_measured(kind: str) -> None:
    if kind == "soft":
        model, images = classifier(3, 3, "soft")
    else:
        model, images = classifier(1 if kind == "one expert" else 3)
    if kind == "dual":
        model = DualClassifier(classifier()[0], model, alpha=0.7).eval()
        images = Split(images.x, model(images.x).argmax(1))
    own = evaluation(model, images, restarts=2)
    report, found = measure(own), examples(own)
    assert report["sa"] == 1 and report["verdict"] <= min(report["attacks"].values())
    assert report["aa"] == report["attacks"]["autoattack"] <= report["attacks"]["square"] <= 1
    assert (found["x_adv"] - found["x"]).abs().max() <= 0.02 and len(report["ra_e"]) == model.num_experts
    assert found["label"].tolist() == sorted(set(images.y.tolist()))
    assert (report["ra_r"] is None) == (report["route_radius"] is None) == (kind == "one expert")
    assert ("joint" in report["attacks"]) == (kind != "one expert") and report["checks"]["deterministic"]["passed"]
    assert "withstand every attack of the full suite" in verdict(report | {"suite": "full"})


def test_the_verdict_is_the_union_of_attacks_that_skip_broken_images() -> None:
    model, images = classifier()
    images.y[11] = (images.y[11] + 1) % 5  # misclassified without an attack
    own = evaluation(model, images)
    others = images.x[(images.y[:, None] != images.y).int().argmax(1)]  # for each image, one of another class
    tried: list[int] = []

    def breaking(*rows: int) -> Any:
        def find(x: Tensor, y: Tensor) -> Tensor:
            tried.append(len(x))
            chosen = (x[:, None] == images.x[list(rows)]).flatten(2).all(2).any(1)
            other = others[(x[:, None] == images.x).flatten(2).all(2).int().argmax(1)]
            return torch.where(chosen[:, None, None, None], other, x)

        return find

    own.find("first", breaking(0, 1))
    own.find("second", breaking(1, 2, 3))
    assert tried == [11, 9] and own.standing.tolist() == [False] * 4 + [True] * 7 + [False]
    assert [(r.name, r.attacked, r.broken, r.accuracy) for r in own.results] == [
        ("first", 11, 2, 9 / 12),
        ("second", 9, 2, 7 / 12),
    ]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_route_radius_is_exact(norm: str) -> None:
    model, images = classifier()
    model.double()
    x = images.x.double()
    weight = affine_router(model, x)
    assert weight is not None
    torch.testing.assert_close(weight, model.moe.router[1].weight / model.normalize.std.flatten())
    radius = route_radius(model, x, norm, weight)
    chosen = model.route(x).experts[:, 0].long()
    for scale, flips in ((0.999, False), (1.001, True)):
        flipped = torch.zeros(12, dtype=torch.bool)
        for slope in (weight - weight[chosen][:, None]).unbind(1):  # towards each expert, straight
            step = slope.sign() if norm == "Linf" else slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-12)
            moved = x + (scale * radius[:, None] * step).view_as(x)
            flipped |= model.route(moved).experts[:, 0] != chosen
        assert (flipped == flips).all()


def test_a_router_that_is_not_affine_has_no_radius() -> None:
    model, images = classifier()
    model.moe.router = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 3))
    assert affine_router(model, images.x) is None


def test_the_papers_certificate_holds(robust_digits: tuple[RobustClassifier, Split]) -> None:
    model, images = robust_digits
    x, y = images.x, images.y
    weight = affine_router(model, x)
    assert weight is not None
    found = paper_certificate(model, x, y, weight)
    assert found is not None and 0 < found["median_radius"] <= found["greatest_radius"]

    def soft(x: Tensor) -> Tensor:
        gates = model.route(x).logits.softmax(1)
        alone = torch.stack([model(x, routing=model.route(x).fixed(e)).softmax(1) for e in range(3)], 1)
        return (gates[:, :, None] * alone).sum(1)

    x_adv = APGD(soft, found["greatest_radius"], steps=5, loss="margin")(x, y)
    changed = (soft(x_adv) - soft(x)).abs().amax(1)
    bound = found["greatest_radius"] * (sum(found["gate_lipschitz"]) + max(found["expert_lipschitz"]))
    assert (changed <= bound).all()
    assert paper_certificate(classifier()[0], x, y, weight) is None


def test_gradient_masking_is_detected() -> None:
    """The logits are rounded: gradients vanish, and only Square, which needs none, succeeds."""

    class Rounded(nn.Module):
        num_experts = 1

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            logits = self.model(x)
            return (20 * logits).round() / 20 + 0 * logits

    model, images = classifier(1)
    rounded = Rounded(model)
    images = Split(images.x, rounded(images.x).argmax(1))
    own = evaluation(rounded, images, queries=100)
    own.strength = dataclasses.replace(own.strength, eps=0.1)
    ensemble, white, square, flags = auto_attack(own)
    assert (white & ~square).sum() > 2 and any("zero gradient" in flag for flag in flags)
    assert torch.equal(ensemble, white & square)
    checks = sanity(own, Seen(ensemble, gradients=white, square=square, flags=flags))
    assert not checks["at most 0.2 % of the images, or one, fall to Square only"]["passed"]
    assert not checks["AutoAttack raises no flag"]["passed"]


def test_gradients_are_compared_with_square() -> None:
    """Of twelve images, gradients fail on 0 and 1, Square on 2 to 8: it breaks fewer, but two that gradients do not."""
    model, images = classifier(1)
    rows = torch.arange(12)
    left = rows < 2, (rows >= 2) & (rows < 9)
    for these, more in ((left, 5), (left[::-1], -5)):
        seen = Seen(rows < 0, gradients=these[0], square=these[1])
        checks = sanity(evaluation(model, images, suite="quick"), seen)
        assert checks["gradients break at least as many images as Square"] == {"passed": more > 0, "value": more}
        others = checks["at most 0.2 % of the images, or one, fall to Square only"]
        assert others == {"passed": False, "value": 2 if more > 0 else 7}


def test_a_random_model_is_attacked_through_draws() -> None:
    class Noisy(nn.Module):
        num_experts = 1

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :5] + 0.1 * torch.randn(len(x), 5)

    images = Split(torch.rand(4, 1, 6, 6), torch.zeros(4).long())
    own = evaluation(Noisy(), images)
    assert not is_deterministic(own) and is_deterministic(evaluation(classifier(1)[0], images))
    assert apgd_attacks(own)["apgd-ce"].draws == 20  # type: ignore[attr-defined]


def test_the_interval_is_wilsons() -> None:
    """Computed by hand from its definition: the ends p solve |part - p| = z sqrt(p (1 - p) / n)."""
    for count, n in ((280, 400), (0, 20), (20, 20), (1, 3), (0, 1)):
        part = count / n
        low, high = wilson(part, n)
        assert 0 <= low <= part <= high <= 1
        for end in (low, high):
            assert abs(part - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), abs=1e-6)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)  # none of 20 images does not mean none at all
    half = 1.96 * math.sqrt(0.7 * 0.3 / 400)
    assert wilson(0.7, 400) == pytest.approx((0.7 - half, 0.7 + half), abs=0.006)


def test_the_bands_of_the_plot_do_not_collapse() -> None:
    report = {"eps_curve": [[0.0, 1.0], [0.1, 0.0]], "held_out": 20, "eps": 0.1, "norm": "Linf"}
    (band,) = accuracy({"run": report}, report).axes[0].collections
    low, high = 0.0, 1 / 21  # z = 1: p = z^2 / (n + z^2)
    ys = {round(float(y), 6) for y in band.get_paths()[0].vertices[:, 1]}
    assert ys == {round(y, 6) for y in (low, high, 1 - high, 1 - low)}


def test_every_run_is_drawn_in_its_own_way() -> None:
    report = {"eps_curve": [[0.0, 1.0], [0.1, 0.0]], "held_out": 20, "eps": 0.1, "norm": "Linf"}
    lines = accuracy({f"run {i}": report for i in range(20)}, report).axes[0].get_lines()[1:]  # the first is at eps
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 20


def test_models_run_unchanged_in_other_toolboxes(robust_digits: tuple[RobustClassifier, Split]) -> None:
    torchattacks, foolbox = pytest.importorskip("torchattacks"), pytest.importorskip("foolbox")
    model, images = robust_digits
    x, y = images.x[:40], images.y[:40]
    clean = (model(x).argmax(1) == y).sum()
    theirs = torchattacks.PGD(model, eps=0.15, alpha=0.05, steps=5)(x, y)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    _, clipped, success = foolbox.attacks.LinfPGD(steps=5)(wrapped, x, y, epsilons=0.15)
    assert (model(theirs).argmax(1) == y).sum() < clean and (model(clipped).argmax(1) == y).sum() < clean
    assert success.any()
