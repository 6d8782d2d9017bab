"""The terms of each method's loss equal its formula, computed image by image in plain torch."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from rter.config import Config
from rter.data.split import Data, Split
from rter.methods import METHODS
from rter.methods.step import Step
from rter.models.build import build_model
from rter.models.classifier import DualClassifier, RobustClassifier
from rter.settings import make_config
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 0.1


@pytest.fixture
def batch() -> Split:
    return Split(torch.rand(12, 1, 6, 5, dtype=torch.float64), torch.randint(3, (12,)))


def tiny(batch: Split, method: str, **settings: Any) -> tuple[RobustClassifier, Config]:
    sizes = {"width": 2} if method == "nine-experts" else {"width": 2, "num_experts": 3}
    weights = {"beta": 1.5, "clean_weight": 0.7, "balance_weight": 0.3}
    config = make_config(method=method, **(sizes | weights | settings))
    return build_model(config, Data(batch, batch, 3)).double(), config


def climb(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """One step of the gradient's sign, which can be computed by hand; stands in for PGD."""
    leaf = start.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), [leaf])
    return (leaf + EPS * grad.sign()).detach()


def plain_kl(clean: Tensor, adversarial: Tensor) -> Tensor:
    p, q = clean.log_softmax(-1), adversarial.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def attack_ce(function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return climb(lambda x1: F.cross_entropy(function(x1), y, reduction="sum"), x)


def attack_kl(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    clean = function(x).detach()
    return climb(lambda x1: plain_kl(clean, function(x1)).sum(), x + 0.01)


@pytest.fixture(autouse=True)
def plain_attack(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every attack that is made."""
    made = []

    def make(model: nn.Module, config: Config, eps: Any, steps: int, *purpose: str | int, **options: Any) -> Any:
        made.append(options | {"eps": eps, "steps": steps})

        def run(x: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
            def function(x: Tensor) -> Tensor:
                return model(x, **kwargs)

            return attack_kl(function, x) if options.get("loss") == "kl" else attack_ce(function, x, y)

        return run

    monkeypatch.setattr("rter.methods.step.make_attack", make)
    return made


class Plain:
    """The same model as a loop over images."""

    def __init__(self, model: RobustClassifier) -> None:
        self.normalize, self.moe, self.num_experts = model.normalize, model.moe, model.num_experts

    def expert(self, e: int, x: Tensor) -> Tensor:
        net, x = self.moe.experts, (x - self.normalize.mean) / self.normalize.std
        x = F.conv2d(x, net.conv1.weight[e], net.conv1.bias[e], padding=1).relu()
        x = F.conv2d(x, net.conv2.weight[e], net.conv2.bias[e], stride=2, padding=1).relu()
        x = F.linear(x.flatten(1), net.hidden.weight[e], net.hidden.bias[e]).relu()
        return F.linear(x, net.head.weight[e], net.head.bias[e])

    def router(self, x: Tensor) -> Tensor:
        return self.moe.router((x - self.normalize.mean) / self.normalize.std)

    def gates(self, x: Tensor) -> Tensor:
        return self.router(x).softmax(-1)

    def ranked(self, x: Tensor, rank: int) -> list[int]:
        return self.gates(x).argsort(-1, descending=True)[:, rank].tolist()

    def alone(self, experts: Sequence[int], x: Tensor) -> Tensor:
        return torch.cat([self.expert(e, row) for e, row in zip(experts, x.split(1), strict=True)])

    def __call__(self, x: Tensor) -> Tensor:
        if self.moe.gate == "soft":
            return sum(self.gates(x)[:, e, None] * self.expert(e, x) for e in range(self.num_experts))
        chosen = self.ranked(x, 0)
        p = self.gates(x)[range(len(x)), chosen, None]
        weight = {"softmax": p, "straight_through": 1 + p - p.detach(), "hard": torch.ones_like(p)}[self.moe.gate]
        return weight * self.alone(chosen, x)

    def balance(self, x: Tensor) -> Tensor:
        gates = self.gates(x)
        load = F.one_hot(gates.argmax(-1), self.num_experts).double().mean(0)
        return self.num_experts * (load * gates.mean(0)).sum()


def routed(step: Step) -> Step:
    """A step at the end of training, when each image goes where the router sends it."""
    return Step(step.model, step.config, step.index, epoch=step.config.epochs)


def assert_terms(step: Step, batch: Split, expected: dict[str, Tensor], number: int = 0) -> None:
    """Values and gradients of one pass of the step's method."""
    run = METHODS[step.config.method].passes[number]
    terms = run.make_loss(step, batch.x, batch.y)()
    assert terms.keys() == expected.keys()
    for name in terms:
        torch.testing.assert_close(terms[name], expected[name])
    parameters = list(run.part(step.model).parameters())
    grads, expected_grads = (
        torch.autograd.grad(sum(losses.values()), parameters, allow_unused=True, materialize_grads=True)
        for losses in (terms, expected)
    )
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("method", ["standard", "pgd-at", "fast-at", "trades", "mart"])
@pytest.mark.parametrize("num_experts", [1, 3])
def test_single_pass_methods(batch: Split, method: str, num_experts: int, plain_attack: list[dict[str, Any]]) -> None:
    model, config = tiny(batch, method, num_experts=num_experts)
    plain, x, y = Plain(model), batch.x, batch.y
    clean = plain(x)
    adversarial = plain(attack_kl(plain, x) if method == "trades" else attack_ce(plain, x, y))
    p, p_adv, label = clean.softmax(-1), adversarial.softmax(-1), F.one_hot(y, 3).bool()
    strongest_other = p_adv.masked_fill(label, 0).amax(1)
    formula = {
        "standard": {"clean": F.cross_entropy(clean, y)},
        "pgd-at": {"adversarial": F.cross_entropy(adversarial, y)},
        "fast-at": {"adversarial": F.cross_entropy(adversarial, y)},
        "trades": {"clean": F.cross_entropy(clean, y), "kl": 1.5 * plain_kl(clean, adversarial).mean()},
        "mart": {
            "adversarial": F.cross_entropy(adversarial, y),
            "margin": -torch.log(1.0001 - strongest_other).mean(),
            "kl": 1.5 * (plain_kl(clean, adversarial) * (1 - p[label])).mean(),
        },
    }[method]
    assert_terms(routed(Step(model, config, 0, epoch=0)), batch, {**formula, "balance": 0.3 * plain.balance(x)})
    options = {
        "standard": [],
        "fast-at": [{"steps": 1, "alpha_ratio": 1.25, "start_ratio": 1, "random_start": True, "prior": None}],
        "trades": [{"steps": 10, "loss": "kl", "random_start": False}],
    }.get(method, [{"steps": 10}])
    assert plain_attack == [{"eps": 0.2, "best_iterate": False, **chosen} for chosen in options]


@pytest.mark.parametrize("number", [0, 1])
def test_advmoe(batch: Split, number: int, plain_attack: list[dict[str, Any]]) -> None:
    model, config = tiny(batch, "advmoe")
    plain, x = Plain(model), batch.x

    def divergence(x1: Tensor) -> Tensor:
        return plain_kl(plain(x), plain(x1)) + plain_kl(plain.router(x), plain.router(x1))

    x1 = climb(lambda x1: divergence(x1).sum(), x + 0.01)
    expected = {
        "clean": F.cross_entropy(plain(x), batch.y),
        "kl": 1.5 * divergence(x1).mean(),
        "balance": 0.3 * plain.balance(x),
    }
    assert_terms(routed(Step(model, config, 0, epoch=0)), batch, expected, number)
    assert (plain_attack[0]["steps"], plain_attack[0]["alpha_ratio"]) == (2, 5 / 8)


def test_advmoe_stays_finite_where_softmax_underflows(batch: Split) -> None:
    model, config = tiny(batch, "advmoe")
    with torch.no_grad():
        model.moe.experts.head.weight.mul_(1e5)
        model.moe.router[1].weight.mul_(1e5)
    step = routed(Step(model, config, 0, epoch=0))
    terms = METHODS["advmoe"].passes[0].make_loss(step, batch.x, batch.y)()
    grads = torch.autograd.grad(sum(terms.values()), list(model.moe.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


def rt_er(plain: Plain, step: Step, batch: Split) -> dict[str, Tensor]:
    x, y = batch.x, batch.y
    own, ranks = step.own_route(x), range(1, 2 if step.config.second == "ranked" else 3)
    second = step.ranked_route(x, ranks, "second").experts[:, 0].tolist()
    moe = plain if own is None else lambda x: plain.alone(own.experts[:, 0].tolist(), x)
    x1 = attack_ce(moe, x, y)
    x2 = attack_ce(lambda x: plain.alone(second, x), x, y)
    clean = plain.alone(second, x)
    return {
        "adversarial": F.cross_entropy(moe(x1), y),
        "kl": 1.5 * plain_kl(clean, plain.alone(second, x2)).mean(),
        "clean_second": 0.7 * F.cross_entropy(clean, y),
        "balance": 0.3 * plain.balance(x),
    }


@pytest.mark.parametrize("second", ["random", "ranked"])
@pytest.mark.parametrize("gate", ["softmax", "straight_through", "hard"])
@pytest.mark.parametrize("epoch", [0, 50])
def test_rt_er(batch: Split, epoch: int, gate: str, second: str) -> None:
    model, config = tiny(batch, "rt-er", gate=gate, second=second)
    step = Step(model, config, 0, epoch=epoch)
    assert_terms(step, batch, rt_er(Plain(model), step, batch))


def test_faithful_rt_er_is_the_public_codes_loss(batch: Split) -> None:
    config = make_config(method="rt-er", faithful=True, num_experts=3, width=2)
    model = build_model(config, Data(batch, batch, 3)).double()
    step = Step(model, config, 0, epoch=0)
    assert step.own_route(batch.x) is None and (config.gate, config.second, config.beta) == ("hard", "ranked", 6)
    expected = rt_er(Plain(model), step, batch)
    expected["kl"] = 4 * expected["kl"]
    expected["clean_second"] = 0 * expected.pop("balance")
    assert_terms(step, batch, expected)


@pytest.mark.parametrize("epoch", [0, 50])
def test_dual(batch: Split, epoch: int) -> None:
    model, config = tiny(batch, "dual")
    assert isinstance(model, DualClassifier)
    step, standard = Step(model, config, 0, epoch=epoch), Plain(model.standard)
    own = Step(model.standard, config, 0, epoch=epoch).own_route(batch.x)
    logits = standard(batch.x) if own is None else standard.alone(own.experts[:, 0].tolist(), batch.x)
    clean = {"clean": F.cross_entropy(logits, batch.y), "balance": 0.3 * standard.balance(batch.x)}
    assert_terms(step, batch, clean, 0)
    assert_terms(step, batch, rt_er(Plain(model.robust), Step(model.robust, config, 0, epoch=epoch), batch), 1)


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_jtdmoe(batch: Split, mix: str) -> None:
    model, config = tiny(batch, "jtdmoe", dual_alpha=0.6, dual_mix=mix)
    assert isinstance(model, DualClassifier)
    standard, robust, x, y = Plain(model.standard), Plain(model.robust), batch.x, batch.y
    step = routed(Step(model, config, 0, epoch=0))

    def apart(e: int) -> Tensor:
        def expert(x: Tensor) -> Tensor:
            return robust.expert(e, x)

        return plain_kl(expert(x), expert(attack_ce(expert, x, y))).sum()

    expected = {
        "adversarial": F.cross_entropy(robust(attack_ce(robust, x, y)), y),
        "kl": 1.5 / len(x) * sum(apart(e) for e in range(3)),
        "balance": 0.3 * robust.balance(x),
    }
    assert_terms(step, batch, expected, 0)
    mixed = 0.4 * standard(x) + 0.6 * robust(x).detach()
    if mix == "probabilities":
        mixed = (0.4 * standard(x).softmax(1) + 0.6 * robust(x).detach().softmax(1)).log()
    assert_terms(step, batch, {"clean": F.cross_entropy(mixed, y), "balance": 0.3 * standard.balance(x)}, 1)


def test_nine_separate_experts_train_as_if_each_were_alone(batch: Split, plain_attack: list[dict[str, Any]]) -> None:
    model, config = tiny(batch, "nine-experts")
    plain, x, y = Plain(model), batch.x, batch.y
    step = Step(model, config, 0, epoch=0)

    def loss_of(e: int) -> Tensor:
        def expert(x: Tensor) -> Tensor:
            return plain.expert(e, x)

        return F.cross_entropy(expert(attack_ce(expert, x, y) if e else x), y)

    each = [loss_of(e) for e in range(9)]
    assert_terms(step, batch, {"benign": each[0], "fgsm": sum(each[1:5]), "pgd": sum(each[5:])})
    together = METHODS["nine-experts"].passes[0].make_loss(step, x, y)()
    experts = list(model.moe.experts.parameters())
    for e in range(9):
        retained = torch.autograd.grad(sum(together.values()), experts, retain_graph=True)
        for grad, own in zip(retained, torch.autograd.grad(loss_of(e), experts), strict=True):
            torch.testing.assert_close(grad[e], own[e])
    fgsm, pgd = plain_attack[:2]
    ninths = fgsm["eps"].view(4, 12) * 9 / config.eps
    torch.testing.assert_close(ninths, ninths[:, :1].round().expand(4, 12))
    assert ninths.min() >= 1 and ninths.max() <= 9 and (fgsm["steps"], fgsm["random_start"]) == (1, False)
    assert pgd["steps"] in (2, 4, 6, 8, 10)


def test_nine_experts_together(batch: Split) -> None:
    model, config = tiny(batch, "nine-experts")
    plain, x, y = Plain(model), batch.x, batch.y
    adversarial = plain(attack_ce(plain, x, y))
    expected = {"clean": F.cross_entropy(plain(x), y), "adversarial": F.cross_entropy(adversarial, y)}
    assert_terms(routed(Step(model, config, 0, epoch=0)), batch, expected)


def test_exploring_draws_the_first_or_second_expert_by_step(batch: Split) -> None:
    model, config = tiny(batch, "rt-er")
    plain = Plain(model)

    def chosen(index: int) -> list[int]:
        route = Step(model, config, index, epoch=0).own_route(batch.x)
        assert route is not None and torch.equal(route.weights, torch.ones(12, 1, dtype=torch.float64))
        return route.experts[:, 0].tolist()

    first, second = plain.ranked(batch.x, 0), plain.ranked(batch.x, 1)
    draws = [chosen(index) for index in range(4)]
    ranks = [{f: 0, s: 1}[c] for draw in draws for c, f, s in zip(draw, first, second, strict=True)]
    assert {0, 1} == set(ranks)
    assert draws[0] == chosen(0) and draws[0] != draws[1]
    assert Step(model, config, 0, epoch=24).exploring and not Step(model, config, 0, epoch=25).exploring


def test_the_second_expert_of_rt_er_is_any_but_the_first(batch: Split) -> None:
    model, config = tiny(batch, "rt-er", num_experts=4)
    order = [Plain(model).ranked(batch.x, rank) for rank in range(4)]

    def ranks(index: int, drawn: range) -> list[int]:
        experts = Step(model, config, index, epoch=0).ranked_route(batch.x, drawn, "second").experts[:, 0].tolist()
        return [[row[i] for row in order].index(e) for i, e in enumerate(experts)]

    draws = [ranks(index, range(1, 4)) for index in range(4)]
    assert {rank for draw in draws for rank in draw} == {1, 2, 3}
    assert draws[0] == ranks(0, range(1, 4)) and draws[0] != draws[1]
    assert ranks(0, range(1, 2)) == [1] * 12


def test_the_model_is_a_function_of_the_seed_and_leaves_the_global_state(batch: Split) -> None:
    before = torch.random.get_rng_state()
    (one, _), (two, _), (other, _) = tiny(batch, "rt-er"), tiny(batch, "rt-er"), tiny(batch, "rt-er", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (one, two, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert one.moe.router[1].bias.abs().max() == 0
