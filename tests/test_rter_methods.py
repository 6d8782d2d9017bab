"""Each method's terms equal its formula, computed image by image in plain torch."""

from typing import Any

import pytest
import torch
from rter.config import Config
from rter.data import Data, Split
from rter.methods import METHODS
from rter.methods.step import Step
from rter.models import RobustClassifier, build_model
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 0.1


@pytest.fixture
def batch() -> Split:
    return Split(torch.rand(12, 1, 6, 5), torch.randint(3, (12,)))


def tiny(batch: Split, method: str, **settings: Any) -> tuple[RobustClassifier, Config]:
    config = Config(method=method, num_experts=3, width=2, beta=1.5, clean_weight=0.7, balance_weight=0.3, **settings)
    return build_model(config, Data(batch, batch, 3)), config


def fgsm(model: nn.Module, config: Config, eps: float, steps: int, *purpose: str | int, **options: Any) -> Any:
    """Stands in for PGD: one signed step, without a random start, so that it can be followed by hand."""

    def run(x: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x, **kwargs), y, reduction="sum"), [x])
        return (x + EPS * grad.sign()).detach()

    return run


@pytest.fixture(autouse=True)
def plain_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rter.methods.step.make_attack", fgsm)


class Plain:
    """The same model as a loop over images."""

    def __init__(self, model: RobustClassifier) -> None:
        self.model = model

    def expert(self, e: int, x: Tensor) -> Tensor:
        net = self.model.moe.experts
        x = F.conv2d(x, net.conv1.weight[e], net.conv1.bias[e], padding=1).relu()
        x = F.conv2d(x, net.conv2.weight[e], net.conv2.bias[e], stride=2, padding=1).relu()
        x = F.linear(x.flatten(1), net.hidden.weight[e], net.hidden.bias[e]).relu()
        return F.linear(x, net.head.weight[e], net.head.bias[e])

    def gates(self, x: Tensor) -> Tensor:
        return self.model.moe.router(self.normalize(x)).softmax(-1)

    def normalize(self, x: Tensor) -> Tensor:
        return (x - self.model.normalize.mean) / self.model.normalize.std

    def ranked(self, x: Tensor, rank: int) -> list[int]:
        return self.gates(x).argsort(-1, descending=True)[:, rank].tolist()

    def alone(self, experts: list[int], x: Tensor) -> Tensor:
        return torch.cat([self.expert(e, row) for e, row in zip(experts, self.normalize(x).split(1), strict=True)])

    def __call__(self, x: Tensor) -> Tensor:
        chosen = self.ranked(x, 0)
        p = self.gates(x)[range(len(x)), chosen, None]
        return self.alone(chosen, x) * (1 + p - p.detach())  # the straight-through gate

    def balance(self, x: Tensor) -> Tensor:
        gates = self.gates(x)
        load = F.one_hot(gates.argmax(-1), 3).double().mean(0).to(gates)
        return 3 * (load * gates.mean(0)).sum()

    def attacked(self, function: Any, x: Tensor, y: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(function(leaf), y, reduction="sum"), [leaf])
        return x + EPS * grad.sign()


def assert_terms(terms: dict[str, Tensor], expected: dict[str, Tensor], model: RobustClassifier) -> None:
    assert terms.keys() == expected.keys()
    for name in terms:
        torch.testing.assert_close(terms[name], expected[name])
    grads = torch.autograd.grad(sum(terms.values()), list(model.parameters()))
    expected_grads = torch.autograd.grad(sum(expected.values()), list(model.parameters()))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_standard(batch: Split) -> None:
    model, config = tiny(batch, "standard")
    plain = Plain(model)
    terms = METHODS["standard"].terms(Step(model, config, 0, exploring=False), batch.x, batch.y)
    expected = {"clean": F.cross_entropy(plain(batch.x), batch.y), "balance": 0.3 * plain.balance(batch.x)}
    assert_terms(terms, expected, model)


def test_pgd_at(batch: Split) -> None:
    model, config = tiny(batch, "pgd-at")
    plain = Plain(model)
    terms = METHODS["pgd-at"].terms(Step(model, config, 0, exploring=False), batch.x, batch.y)
    x1 = plain.attacked(plain, batch.x, batch.y)
    expected = {"adversarial": F.cross_entropy(plain(x1), batch.y), "balance": 0.3 * plain.balance(batch.x)}
    assert_terms(terms, expected, model)


@pytest.mark.parametrize("exploring", [False, True])
def test_rt_er(batch: Split, exploring: bool) -> None:
    model, config = tiny(batch, "rt-er")
    plain, x, y = Plain(model), batch.x, batch.y
    step = Step(model, config, 0, exploring)
    terms = METHODS["rt-er"].terms(step, x, y)

    second = plain.ranked(x, 1)
    own = step.own_route(x)
    moe = plain if own is None else lambda x: plain.alone(own.experts[:, 0].tolist(), x)
    x1 = plain.attacked(moe, x, y)
    x2 = plain.attacked(lambda x: plain.alone(second, x), x, y)
    clean, adversarial = plain.alone(second, x).log_softmax(-1), plain.alone(second, x2).log_softmax(-1)
    expected = {
        "adversarial": F.cross_entropy(moe(x1), y),
        "kl": 1.5 * (clean.exp() * (clean - adversarial)).sum() / len(x),
        "clean_second": 0.7 * F.nll_loss(clean, y),
        "balance": 0.3 * plain.balance(x),
    }
    assert_terms(terms, expected, model)


def test_exploring_draws_the_first_or_second_expert_by_step(batch: Split) -> None:
    model, config = tiny(batch, "rt-er")
    plain = Plain(model)

    def chosen(index: int) -> list[int]:
        route = Step(model, config, index, exploring=True).own_route(batch.x)
        assert route is not None and torch.equal(route.weights, torch.ones(12, 1))
        return route.experts[:, 0].tolist()

    first, second = plain.ranked(batch.x, 0), plain.ranked(batch.x, 1)
    draws = [chosen(index) for index in range(4)]
    ranks = [{f: 0, s: 1}[c] for draw in draws for c, f, s in zip(draw, first, second, strict=True)]
    assert {0, 1} == set(ranks)
    assert draws[0] == chosen(0) and draws[0] != draws[1]
    assert Step(model, config, 0, exploring=False).own_route(batch.x) is None


def test_the_model_is_a_function_of_the_seed_and_leaves_the_global_state(batch: Split) -> None:
    before = torch.random.get_rng_state()
    (one, _), (two, _), (other, _) = tiny(batch, "rt-er"), tiny(batch, "rt-er"), tiny(batch, "rt-er", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (one, two, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert one.moe.router[1].bias.abs().max() == 0
