"""One update: which parameters change, how AWP perturbs them, and that the attack leaves nothing behind."""

import copy
from typing import Any

import pytest
import torch
from rter.config import Config
from rter.data.split import Data, Split
from rter.methods import METHODS
from rter.methods.awp import perturbed_weights
from rter.methods.step import Step
from rter.methods.update import update
from rter.models.build import build_model
from rter.models.classifier import Normalize, RobustClassifier
from rter.settings import make_config
from torch import Tensor, nn

from moe_kernels import ExpertResNet18, RobustMoE


@pytest.fixture
def batch() -> Split:
    return Split(torch.rand(8, 1, 6, 6), torch.randint(3, (8,)))


def tiny(batch: Split, method: str, **settings: Any) -> tuple[RobustClassifier, Config]:
    config = make_config(method=method, width=2, attack_steps=1, **settings)
    return build_model(config, Data(batch, batch, 3)), config


def with_batch_norm(batch: Split, num_experts: int = 2) -> RobustClassifier:
    experts = ExpertResNet18(num_experts, 3, 1, width=2)
    router = nn.Sequential(nn.Flatten(), nn.Linear(36, num_experts))
    return RobustClassifier(Normalize(batch.x), RobustMoE.from_experts(experts, router, gate="straight_through"))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("epoch", [0, 50])
@pytest.mark.parametrize("awp_gamma", [0.0, 0.01])
def test_every_method_updates_and_repeats_itself(batch: Split, method: str, epoch: int, awp_gamma: float) -> None:
    model, config = tiny(batch, method, awp_gamma=awp_gamma, awp_warmup=0)
    twin, before = copy.deepcopy(model), values(model)
    records = []
    for each in (model, twin):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2)
        torch.rand(len(records) + 1)  # the global random state does not matter
        records.append(update(Step(each, config, 0, epoch=epoch), optimizer, batch))
    assert moved(model, before) and moved(model, values(twin)) == set()
    assert all(torch.equal(records[0][name], records[1][name]) for name in records[0])
    terms = [value for name, value in records[0].items() if name != "loss"]
    torch.testing.assert_close(records[0]["loss"], torch.stack(terms).sum())
    assert not any(value.requires_grad for value in records[0].values())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("method", "first", "second"),
    [
        ("advmoe", "moe.experts.", "moe.router."),
        ("dual", "standard.moe.", "moe."),
        ("jtdmoe", "moe.", "standard.moe."),
    ],
)
def test_a_pass_updates_only_its_part(
    batch: Split, method: str, first: str, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = tiny(batch, method)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    update(Step(model, config, 0, epoch=50), optimizer, batch)  # fills Adam's momentum
    states = [values(model)]
    plain_step = optimizer.step

    def step() -> None:
        plain_step()
        states.append(values(model))

    monkeypatch.setattr(optimizer, "step", step)
    update(Step(model, config, 1, epoch=50), optimizer, batch)
    for before, after, part in zip(states, states[1:], (first, second), strict=False):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed and all(name.startswith(part) for name in changed)
    assert len(states) == 3


def test_awp_takes_the_gradient_at_the_perturbed_weights_and_restores_them(batch: Split) -> None:
    model, config = tiny(batch, "standard", awp_gamma=0.05, awp_warmup=0, balance_weight=0)
    model = model.double()
    batch = Split(batch.x.double(), batch.y)
    moved_by_hand, before = copy.deepcopy(model), values(model)
    step = Step(moved_by_hand, config, 0, epoch=50)
    sum(METHODS["standard"].passes[0].make_loss(step, batch.x, batch.y)().values()).backward()
    with torch.no_grad():
        for name, parameter in moved_by_hand.named_parameters():
            if name == "moe.router.1.weight":
                parameter += 0.05 * parameter.norm() * parameter.grad / parameter.grad.norm()
            elif name.endswith("weight"):
                for w, g in zip(parameter, parameter.grad, strict=True):  # an expert's own matrix or kernel
                    w += 0.05 * w.norm() * g / g.norm() if g.any() else 0
    expected = METHODS["standard"].passes[0].make_loss(step, batch.x, batch.y)()
    gradients = torch.autograd.grad(sum(expected.values()), list(moved_by_hand.parameters()))

    lr = 1e-3
    record = update(Step(model, config, 0, epoch=50), torch.optim.SGD(model.parameters(), lr=lr), batch)
    torch.testing.assert_close(record["clean"], expected["clean"].detach())
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter, before[name] - lr * gradient, msg=name)


def test_awp_restores_bit_for_bit_also_after_an_exception(batch: Split) -> None:
    model, config = tiny(batch, "pgd-at", awp_gamma=0.3, awp_warmup=0)
    before = values(model)
    update(Step(model, config, 0, epoch=0), torch.optim.SGD(model.parameters(), lr=0.0), batch)
    assert moved(model, before) == set()
    model(batch.x).sum().backward()
    with pytest.raises(KeyError), perturbed_weights(model, 0.3):
        assert moved(model, before) == {
            name for name, p in model.named_parameters() if p.ndim > 2 or "router.1.w" in name
        }
        raise KeyError
    assert moved(model, before) == set()


def test_awp_waits_for_its_warm_up(batch: Split) -> None:
    model, config = tiny(batch, "pgd-at", awp_gamma=0.3)
    gammas = [Step(model, config, 0, epoch=epoch).awp_gamma for epoch in (0, 9, 10)]
    assert gammas == [0, 0, 0.3]


@pytest.mark.parametrize("method, awp_gamma", [("pgd-at", 0.0), ("pgd-at", 0.01), ("rt-er", 0.0)])
def test_batch_norm_counts_each_batch_once_and_never_the_attack(batch: Split, method: str, awp_gamma: float) -> None:
    config = make_config(method=method, num_experts=2, attack_steps=3, awp_gamma=awp_gamma, awp_warmup=0)
    model = with_batch_norm(batch).train()
    counted = model.moe.experts.bn1.num_batches_tracked
    update(Step(model, config, 0, epoch=0), torch.optim.SGD(model.parameters(), lr=0.1), batch)
    assert counted is model.moe.experts.bn1.num_batches_tracked and counted.max() == 1
    assert all(module.training for module in model.modules())
