"""Any user's model is evaluated: a plain CNN, a transformer, a mixture of modules."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from any_model import WEAK, cnn, images, mixture, timeless
from rter import UserError, evaluate_model
from rter.evaluate import JOURNAL
from rter.models.adapted import adapt
from runs import broken_off
from torch import Tensor, nn

from moe_kernels import RobustMoE
from moe_kernels.attacks import every_expert

KEYS = {
    "sa",
    "ra",
    "ra_e",
    "ra_r",
    "aa",
    "expert_load",
    "route_flip_rate",
    "eps",
    "method",
    "data",
    "seed",
    "baselines",
}


def test_the_report_of_a_plain_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full suite, killed in the middle of AutoAttack and resumed."""
    model, options = cnn(), {"suite": "full"} | WEAK | {"batch_size": 20}
    x, y = images(model)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        broken_off(9, patch)
        evaluate_model(model, x, y, out=tmp_path, **options)
    parts = [json.loads(line).get("part") for line in (tmp_path / JOURNAL).read_bytes().splitlines()[:-1]]
    assert parts[-1] == "autoattack apgd-ce/0"
    report = evaluate_model(model, x, y, out=tmp_path, **options)
    assert timeless(report) == timeless(evaluate_model(model, x, y, **options))
    figures = json.loads(report.to_json())
    assert figures.keys() >= KEYS and figures == json.loads((tmp_path / "report.json").read_text())
    assert (figures["num_experts"], figures["ra_e"], figures["expert_load"], figures["ra_r"]) == (0, [], [], None)
    assert figures["routes"] == "none: the model has no experts, so attacks on routes are skipped"
    assert report.aa is not None and report.verdict.value <= report.aa.value <= report.sa.value == 0.95
    for accuracy in (report.sa, report.ra, report.aa, report.verdict):
        assert 0 <= accuracy.low <= accuracy.value <= accuracy.high <= 1 and accuracy.low < accuracy.high
    names = [result.name for result in report.attacks]
    assert names[0] == "pgd" and "square" in names and names[-1] == "autoattack" and "joint" not in names
    first = report.attacks[0]
    assert first.attacked == 19 and first.broken == first.new == round(20 * (report.sa.value - report.ra.value))
    assert all(result.attacked <= 19 - first.broken for result in report.attacks[1:] if "autoattack" not in result.name)
    assert sum(result.new for result in report.attacks) == round(20 * (report.sa.value - report.verdict.value))
    text = str(report)
    for part in (
        "clean accuracy         95.00%   [76.39%, 99.11%]",
        "autoattack fab-t",
        "attacks on routes are skipped",
    ):
        assert part in text
    assert report.checks["no image withstands an unbounded attack"] == {"passed": True, "value": 0.0}
    rows = torch.cat([(y == label).nonzero()[0] for label in y.unique()])
    assert torch.equal(report.examples["x"], x[rows])
    assert (report.examples["x_adv"] - x[rows]).abs().max() <= 1 / 50 + 1e-6


def test_a_mixture_inside_a_module_is_attacked_like_one_with_a_route_method() -> None:
    """The model routes by itself, as the README's block does; forcing its route from outside gives the same results."""

    class Offering(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.num_experts = inner, 3

        def route(self, x: Tensor) -> Any:
            return self.inner[1].route(self.inner[0](x))  # type: ignore[index]

        def forward(self, x: Tensor, routing: Any = None) -> Tensor:
            y: Tensor = self.inner[1](self.inner[0](x), routing=routing)  # type: ignore[index]
            return y

    class Routing(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner[0](x)  # type: ignore[index]
            y: Tensor = self.inner[1](h, routing=self.inner[1].route(h))  # type: ignore[index]
            return y

    model = mixture()
    x, y = images(model)
    reports = [evaluate_model(m, x, y, suite="quick", **WEAK) for m in (model, Offering(model), Routing(model))]
    for report in reports:
        assert report.figures["routes"] == "attacked" and len(report.figures["ra_e"]) == 3
        assert "expert and route, weight 0.1" in report.figures["attacks"] and report.figures["route_flip_rate"] > 0
        names: dict[str, Any] = {"method": 0, "identity": 0}  # in which the names of the weights count, too
        assert timeless(report) | names == timeless(reports[0]) | names


@pytest.mark.parametrize("kind", ["two layers", "tokens", "twice", "lambda", "no gradient"])
def test_a_route_that_cannot_be_attacked_is_named(kind: str) -> None:
    class Twice(nn.Module):
        def __init__(self, moe: RobustMoE) -> None:
            super().__init__()
            self.moe = moe

        def forward(self, x: Tensor) -> Tensor:
            return self.moe(self.moe(x.flatten(1)))

    class Deaf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach().flatten(1)[:, :2]

    layer = RobustMoE(192, 8, 2, 1)
    models: dict[str, tuple[Any, str]] = {
        "two layers": (nn.Sequential(nn.Flatten(), layer, RobustMoE(192, 8, 2)), "2 RobustMoE layers"),
        "tokens": (
            nn.Sequential(
                nn.Flatten(0, 1), nn.Flatten(), RobustMoE(64, 8, 2, 1), nn.Unflatten(0, (-1, 3)), nn.Flatten()
            ),
            r"\[6, 2\]",
        ),
        "twice": (Twice(layer), "does not run exactly once per forward"),
        "lambda": (lambda x: layer(x.flatten(1)), "is not a module"),
        "no gradient": (RobustMoE.from_experts([nn.Flatten(), nn.Flatten()], Deaf()), "have no gradient"),
    }
    model, said = models[kind]
    adapted, routes = adapt(model, torch.rand(2, 3, 8, 8), (0, 1))
    assert adapted.num_experts == 0 and re.search(said, routes) and "attacked" in routes


def test_all_tokens_of_an_image_are_sent_to_one_expert() -> None:
    torch.manual_seed(0)
    moe = RobustMoE(64, 8, 3, 2)
    model = nn.Sequential(nn.Flatten(2), moe, nn.Flatten(), nn.Linear(192, 4))
    x, y = images(model)
    model.eval()
    adapted: Any = adapt(model, x[:2], (0, 1))[0]
    route = adapted.route(x)
    tokens = moe.route(x.flatten(2))
    torch.testing.assert_close(route.logits, tokens.logits.mean(1))
    assert torch.equal(adapted(x, routing=route), model(x))
    assert torch.equal(route.experts[:, 0].long(), route.logits.argmax(1))
    alone = every_expert(adapted, x)
    for e in range(3):
        torch.testing.assert_close(alone[e], model[2:](moe(x.flatten(2), routing=tokens.fixed(e))))
    report = evaluate_model(model, x, y, suite="quick", **WEAK)
    assert report.figures["routes"] == "attacked, all tokens of an image together"
    assert len(report.figures["ra_e"]) == 3 and "expert and route, weight 0.1" in report.figures["attacks"]


def test_bounds_only_change_the_units() -> None:
    model = cnn()
    x, y = images(model)
    report = evaluate_model(model, x, y, suite="quick", **WEAK)
    wide = evaluate_model(lambda v: model.eval()(v / 256), 256 * x, y, bounds=(0, 256), suite="quick",
                          **WEAK | {"eps": "256/50"})  # fmt: skip
    assert wide.figures["attacks"] == report.figures["attacks"] and wide.figures["eps"] == pytest.approx(256 / 50)
    assert torch.equal(wide.examples["x_adv"] / 256, report.examples["x_adv"])
    assert wide.figures["eps_curve"][1][0] == pytest.approx(0.25 * 256 / 50)


class Says(nn.Module):
    """Returns a function of a network's logits."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.net, self.function = cnn(), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.net(x))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z: z.softmax(1), "model must return logits, got probabilities"),
        (lambda z: (z, z), "model must return logits [B, classes], got a tuple of 2"),
        (lambda z: {"a": z}, "model must return logits [B, classes], got a dict"),
        (lambda z: z[:1], "model must return logits [2, classes] for 2 images, got torch.float32 [1, 4]"),
        (lambda z: z[:, :, None], "model must return logits [2, classes] for 2 images, got torch.float32 [2, 4, 1]"),
        (lambda z: z.argmax(1), "model must return logits [2, classes] for 2 images, got torch.int64 [2]"),
        (lambda z: z * float("nan"), "model must return finite logits, got nan"),
        (lambda z: z[:, :1], "model must return the logits of at least 2 classes, got shape [2, 1]"),
        (lambda z: z @ z, "model must accept images float32 [2, 3, 8, 8], but raised RuntimeError: mat1 and mat2"),
    ],
)
def test_what_a_model_must_return(function: Any, message: str) -> None:
    model = Says(function).train()
    with pytest.raises(UserError, match=rf"^{re.escape(message)}[^\n]*$"):
        evaluate_model(model, torch.rand(4, 3, 8, 8), torch.arange(4), suite="quick", **WEAK)
    assert model.training and model.net[3].training


def test_a_random_model_is_reported_as_random_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Says(lambda z: z + 0.1 * torch.randn_like(z))
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6) % 4
    options = {"suite": "quick"} | WEAK | {"steps": 1}
    whole = evaluate_model(model, x, y, **options)
    assert (
        not whole.checks["deterministic"]["passed"] and "FAILED, of 1" in str(whole) and "deterministic" in str(whole)
    )
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        broken_off(5, patch)
        evaluate_model(model, x, y, out=tmp_path, **options)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    resumed = evaluate_model(model, x, y, out=tmp_path, **options)
    assert timeless(resumed) == timeless(whole) and torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(resumed.examples[name], value) for name, value in whole.examples.items())


def test_a_model_that_is_always_wrong() -> None:
    model = mixture()
    x, y = images(model)
    wrong = (y + 1) % 4
    nothing = evaluate_model(model, x, wrong, suite="quick", **WEAK)
    wrong[1] = y[1]
    report = evaluate_model(model, x, wrong, suite="quick", **WEAK)
    assert (report.sa.value, report.attacks[0].attacked) == (0.05, 1) and report.verdict.high > 0.1
    assert nothing.sa.value == nothing.ra.value == 0 and all(result.broken == 0 for result in nothing.attacks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 0}, "eps must be a number above 0 or a fraction such as 8/255, got 0"),
        ({"eps": "8/x"}, "eps must be a number above 0 or a fraction such as 8/255, got '8/x'"),
        ({"eps": 8}, "eps must be at most 1, the width of bounds (0, 1), got 8; write 8/255, not 8"),
        ({"norm": "L0"}, "norm must be one of Linf, L2, L1, got 'L0'"),
        ({"suite": "all"}, "suite must be one of pgd, quick, full, got 'all'"),
        ({"bounds": (1, 0)}, "bounds must be (low, high) with low < high, got (1, 0)"),
        ({"bounds": (0, 0.5)}, "x must lie within bounds (0, 0.5), got values from"),
        ({"batch_size": 0}, "batch_size must be a whole number above 0, got 0"),
        ({"seed": -1}, "seed must be a whole number, at least 0, got -1"),
        ({"x": torch.zeros(4, 3, 8)}, "x must be images [n, C, H, W], at least one, got shape [4, 3, 8]"),
        ({"x": torch.zeros(0, 3, 8, 8)}, "x must be images [n, C, H, W], at least one, got shape [0, 3, 8, 8]"),
        ({"x": torch.zeros(4, 3, 8, 8).byte()}, "x must be floats within bounds (0, 1), got torch.uint8: divide"),
        ({"x": torch.full((4, 3, 8, 8), torch.nan)}, "x must lie within bounds (0, 1), got values from nan"),
        ({"x": "images"}, "x and y must be tensors: "),
        ({"y": torch.zeros(3).long()}, "y must be 4 integer classes, one for each image, got torch.int64 [3]"),
        ({"y": torch.zeros(4)}, "y must be 4 integer classes, one for each image, got torch.float32 [4]"),
        ({"y": torch.arange(4) + 1}, "y must be less than the 4 classes of the model's logits, got 4"),
        ({"y": torch.arange(4) - 1}, "y must be classes, at least 0, got -1"),
        ({"model": None}, "model must be a module or another callable from images to logits, got NoneType"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    data = {"x": torch.rand(4, 3, 8, 8), "y": torch.arange(4)}
    arguments: dict[str, Any] = {"model": cnn(), "suite": "quick", **data, **WEAK, **changes}
    with pytest.raises(UserError, match=rf"^{re.escape(message)}[^\n]*$"):
        evaluate_model(arguments.pop("model"), arguments.pop("x"), arguments.pop("y"), **arguments)
