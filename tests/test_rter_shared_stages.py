"""Runs whose experts share a trunk, and routers that are trained to keep their choice under attack."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rter.__main__ import main
from rter.checkpoint import load_tensors, read_json
from rter.data.load import load_data
from rter.data.split import Split
from rter.errors import UserError
from rter.methods import METHODS
from rter.methods.step import Step, partly_forced
from rter.methods.update import update
from rter.models.build import build_model
from rter.models.classifier import DualClassifier, RobustClassifier
from rter.optimisation import upcycle
from rter.settings import make_config
from rter.train import train
from runs import assert_same_run
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import RouterLogits, Routing

SHARED: dict[str, Any] = {"model": "resnet18", "width": 2, "num_experts": 3, "shared_stages": 2, "held_out": 60}
TINY = SHARED | {"attack_steps": 1, "batch_size": 200, "train_images": 400, "epochs": 1}


def classifier(**settings: Any) -> tuple[RobustClassifier, Split]:
    config, data = make_config(**(SHARED | settings)), load_data("digits", 60, 0)
    return build_model(config, data).eval(), data.train[:20]


def test_router_and_experts_read_the_trunks_features() -> None:
    model, images = classifier(gate="softmax")
    assert model.trunk is not None and model.moe.router[-1].in_features == 4
    h = model.trunk(model.normalize(images.x))
    logits = model.moe.router(h)
    assert torch.equal(model.route(images.x).logits, logits)
    for x, routing, found in zip(h.split(1), logits.softmax(1).split(1), model(images.x).split(1), strict=True):
        e = int(routing.argmax())
        alone = model.moe.experts(x, torch.tensor([0] * (e + 1) + [1] * (3 - e), dtype=torch.int32))
        torch.testing.assert_close(found, routing[0, e] * alone)


def test_rows_that_are_not_forced_take_the_route_of_their_features() -> None:
    """The trunk runs once for both the logits and the route."""
    model, images = classifier()
    x, last = images.x, model.route(images.x[10:]).fixed(1)
    expected = torch.cat([model(x[:10]), model(x[10:], routing=last)])
    calls: list[int] = []
    model.trunk.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    torch.testing.assert_close(partly_forced(model, None, last)(x), expected)
    assert calls == [20]


def test_a_dual_model_has_two_trunks() -> None:
    model, images = classifier(method="dual")
    assert isinstance(model, DualClassifier) and model.trunk is model.robust.trunk is not model.standard.trunk
    assert any(name.startswith("standard.trunk.") for name in model.state_dict())
    assert model(images.x).shape == (20, 10)


@pytest.mark.parametrize("settings", [{}, {"train_attack": "fgsm-pgi", "route_weight": 0.5, "recompute": "all"}])
def test_trains_resumes_and_is_evaluated(settings: dict[str, Any], tmp_path: Path) -> None:
    config = make_config(**(TINY | settings))
    train(config, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Step, "routing", interrupted(Step.routing, at=2))
        train(config, tmp_path / "run", save_every=0)
    assert train(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    trunk = {name for name in load_tensors(tmp_path / "run" / "best.safetensors") if name.startswith("trunk.")}
    assert "trunk.layer2.1.bn2.running_mean" in trunk and not any("layer3" in name for name in trunk)
    words = ["--suite", "quick", "--steps", "1", "--restarts", "1", "--images", "20"]
    assert main(["evaluate", str(tmp_path / "run"), *words]) == 0
    report = read_json(tmp_path / "run" / "report.json", {})
    assert len(report["ra_e"]) == 3 and report["route_radius"] is None


def interrupted(function: Any, at: int) -> Any:
    calls = iter(range(1, 100))

    def wrapped(*args: Any) -> Any:
        if next(calls) == at:
            raise KeyboardInterrupt
        return function(*args)

    return wrapped


def test_the_router_is_trained_to_keep_its_choice() -> None:
    """The term equals its formula, with one step of the gradient's sign from the start that is drawn for the route."""
    settings = {"method": "pgd-at", "train_attack": "fgsm-rs", "eps": 0.1, "route_weight": 0.5, "explore": 0}
    model, images = classifier(**settings)
    config = make_config(**(SHARED | settings))
    step = Step(model, config, 3, epoch=0)
    x, chosen = images.x, model.route(images.x).experts[:, 0].long()
    draw = torch.Generator().manual_seed(config.seed_for("route", 3))
    start = (x + 0.1 * torch.empty_like(x).uniform_(-1, 1, generator=draw)).clamp(0, 1)
    x_r = (x + (start + 0.125 * slope(RouterLogits(model), start, chosen) - x).clamp(-0.1, 0.1)).clamp(0, 1)
    terms = step.routing(x)()
    assert terms.keys() == {"balance", "route"}
    torch.testing.assert_close(terms["route"], 0.5 * F.cross_entropy(model.route(x_r).logits, chosen))
    torch.testing.assert_close(step.found[0], x_r)


@pytest.mark.parametrize("method", ["fast-at", "rt-er"])
def test_the_trunk_computes_the_clean_images_once_for_all_routes(method: str) -> None:
    """Besides, it runs in each step of the attack, and in the loss. What balances the router does not train it."""
    model, images = classifier(method=method)
    step = Step(model, make_config(**SHARED | {"method": method, "train_attack": "fgsm-rs", "eps": 0.1}), 0, epoch=0)
    calls: list[Tensor] = []
    model.trunk.register_forward_hook(lambda module, inputs, output: calls.append(output))
    loss = METHODS[method].passes[0].make_loss(step, images.x, images.y)
    assert [len(output) for output in calls if not output.requires_grad] == [20]
    terms = loss()
    assert len(calls) == 3
    grads = torch.autograd.grad(terms["balance"], [*model.parameters()], allow_unused=True)
    trained = {name for (name, _), grad in zip(model.named_parameters(), grads, strict=True) if grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("moe.router.")}


def slope(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), [leaf])[0].sign()


@pytest.mark.parametrize("method", ["pgd-at", "fast-at", "trades", "mart", "rt-er", "dual", "jtdmoe"])
def test_every_method_that_attacks_has_the_term(method: str, tmp_path: Path) -> None:
    train(make_config(method=method, route_weight=0.5, **TINY | {"train_images": 200}), tmp_path / "run")
    (header, *_) = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [name for name in header.split(",") if name.endswith("route")] in (["route"], ["robust_route"])


def test_one_expert_has_no_route_to_keep() -> None:
    model, images = classifier(method="pgd-at", num_experts=1)
    config = make_config(**SHARED | {"method": "pgd-at", "num_experts": 1, "route_weight": 0.5})
    assert Step(model, config, 0, epoch=0).routing(images.x)().keys() == {"balance"}


def test_a_routers_margin_under_attack_grows() -> None:
    """A router trained alone for 40 steps: more of its choices withstand PGD than before; all experts stay in use."""
    model, _ = classifier(shared_stages=0, model="small-conv")
    config = make_config(**SHARED | {"model": "small-conv", "shared_stages": 0, "eps": 0.1, "route_weight": 1.0})
    images = load_data("digits", 60, 0).train[:256]
    optimizer = torch.optim.Adam(model.moe.router.parameters(), 0.003)
    before = kept(model, images.x)
    for index in range(40):
        terms = Step(model, config, index, epoch=0).routing(images.x)()
        optimizer.zero_grad()
        sum(terms.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert kept(model, images.x) > before + 0.2
    assert model.route(images.x).load.min() > 0.05


def kept(model: RobustClassifier, x: Tensor) -> float:
    """The fraction of routes that one linear step, which is exact for a linear router, cannot change."""
    routing: Routing = model.route(x)
    chosen = routing.experts[:, 0].long()
    x_r = (x + 0.1 * slope(RouterLogits(model), x, chosen)).clamp(0, 1)
    return (model.route(x_r).experts[:, 0].long() == chosen).double().mean().item()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shared_stages": 1}, "shared_stages must be at most 4, of resnet18, got 1"),
        ({"shared_stages": 5, "model": "resnet18"}, "shared_stages must be at most 4, of resnet18, got 5"),
        ({"shared_stages": -1}, "shared_stages must be at least 0, got -1"),
        (SHARED | {"method": "advmoe"}, "shared_stages must be 0 for advmoe, which trains experts and router alone"),
        (SHARED | {"init": "net.pt"}, "shared_stages must be 0 with init, whose experts share nothing, got 2"),
        ({"route_weight": 1, "method": "standard"}, "route_weight must be 0 for standard, got 1.0"),
        (
            {"route_weight": 1, "method": "pgd-at", "gate": "soft"},
            "gate must be one that chooses an expert with route_weight above 0, got soft",
        ),
        ({"recompute": "some"}, "recompute must be one of auto, none, activations, all, got 'some'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        make_config(**settings)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("method", ["fast-at", "rt-er", "dual"])
def test_upcycled_experts_are_one_until_they_part(method: str, tmp_path: Path) -> None:
    """With SGD's momentum and a running mean of the weights; resumed inside the epoch in which they part."""
    config = make_config(
        method=method, upcycle=0.5, ema=0.5, optimizer="sgd", **TINY | {"epochs": 2, "eval_every": 1, "lr": 0.1}
    )
    train(config, tmp_path / "whole")
    passes = len(METHODS[method].passes)
    assert passes == 1 + (method == "dual")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("rter.train.update", interrupted(update, at=4))
        train(config, tmp_path / "run", save_every=0)
    weights = load_tensors(tmp_path / "run" / "last.safetensors")
    experts = [t for name, t in weights.items() if "moe.experts." in name]
    assert experts and all(torch.equal(t, t[:1].expand_as(t)) for t in experts)
    assert train(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    after = load_tensors(tmp_path / "whole" / "last.safetensors")["moe.experts.linear.weight"]
    assert not torch.equal(after[0], after[1])


def test_while_upcycling_all_images_train_the_first_expert() -> None:
    config = make_config(method="rt-er", upcycle=0.5, **TINY | {"epochs": 4, "explore": 0.5})
    assert [(config.upcycling(epoch), config.exploring(epoch)) for epoch in range(4)] == [
        (True, False), (True, False), (False, True), (False, False)
    ]  # fmt: skip
    model, images = classifier(method="rt-er")
    update(Step(model.train(), config, 0, epoch=1), torch.optim.SGD(model.parameters(), lr=0.1), images)
    batches = {name: b.tolist() for name, b in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert {tuple(b) for name, b in batches.items() if "moe.experts" in name} == {(1, 0, 0)}
    assert {tuple(b) for name, b in batches.items() if "trunk" in name} == {(1,)}
    assert batches["moe.router.0.num_batches_tracked"] == 1


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_upcycling_copies_weights_statistics_and_moments(kind: str) -> None:
    model, images = classifier()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9) if kind == "SGD" else torch.optim.Adam(model.parameters())
    for _ in range(2):
        model(images.x).logsumexp(1).sum().backward()
        optimizer.step()
    trunk = model.trunk.conv1.weight.clone()
    upcycle(model, optimizer)
    moments = [m for w in model.moe.experts.parameters() for m in optimizer.state[w].values() if m.dim()]
    assert len(moments) == (1 if kind == "SGD" else 2) * len([*model.moe.experts.parameters()])
    tensors = [*model.moe.experts.state_dict().values(), *moments]
    assert all(torch.equal(t, t[:1].expand_as(t)) for t in tensors) and torch.equal(trunk, model.trunk.conv1.weight)


def test_upcycling_that_does_not_fit() -> None:
    for settings, message in {
        ("jtdmoe", 0.5): "upcycle must be 0 for jtdmoe, got 0.5",
        ("rt-er", 1.5): "upcycle must be between 0 and 1, got 1.5",
    }.items():
        with pytest.raises(UserError, match=message):
            make_config(method=settings[0], upcycle=settings[1])


@pytest.mark.parametrize(("stages", "router"), [(0, "linear"), ("0", "linear"), (2, "pooled"), ("2", "pooled")])
def test_the_router_behind_shared_stages(stages: int | str, router: str) -> None:
    """The default, also of settings that come as text; another may be given."""
    assert make_config(model="resnet18", shared_stages=stages).router == router
    assert make_config(model="resnet18", shared_stages=stages, router="conv").router == "conv"
