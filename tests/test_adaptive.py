"""Attacks on mixtures find what ordinary attacks cannot see: a weak expert that no row is routed to at first."""

import inspect
import textwrap

import pytest
import torch
from rter.data.split import Split
from rter.models.classifier import RobustClassifier
from torch import Tensor, nn

import moe_kernels
from moe_kernels import APGD, ExpertAttack, JointAttack, RobustMoE, RouterLogits, SoftBackward
from moe_kernels.attacks import every_expert


class Constant(nn.Module):
    """Predicts `label` for any x; a small part of x in the logits keeps a gradient."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.label = label

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.full((len(x),), self.label), 4) + 1e-3 * x


def hidden_weakness() -> RobustMoE:
    """Expert 0 is always right about class 0, expert 2 always wrong; rows with x_0 + x_1 below 1 go to expert 0."""
    router = nn.Linear(4, 3, bias=True)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[-1.0, -1.0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]))
        router.bias.copy_(torch.tensor([1.0, -9.0, -1.0]))
    return RobustMoE.from_experts([Constant(0), Constant(0), Constant(1)], router, gate="hard")


@pytest.mark.parametrize("attack", [ExpertAttack, JointAttack])
def test_a_weak_expert_behind_the_route_is_found(attack: type[ExpertAttack]) -> None:
    model, y = hidden_weakness(), torch.zeros(20, dtype=torch.int64)
    x = torch.full((20, 4), 0.4)
    assert (model(APGD(model, 0.15, steps=20, loss="margin", random_start=False)(x, y)).argmax(1) == 0).all()
    x_adv = attack(model, 0.15, steps=20, seed=0)(x, y)
    assert (model(x_adv).argmax(1) == 1).all() and (x_adv - x).abs().max() <= 0.15
    out_of_reach = attack(model, 0.05, steps=20, seed=0)(x, y)
    assert (model(out_of_reach).argmax(1) == 0).all()


def test_the_soft_backward_sees_every_expert() -> None:
    model = RobustMoE.from_experts([nn.Linear(4, 3) for _ in range(3)], nn.Linear(4, 3), gate="hard").double()
    x = torch.rand(5, 4, dtype=torch.float64, requires_grad=True)
    view = SoftBackward(model, temperature=2.0)
    torch.testing.assert_close(view(x), model(x))
    gates = (model.router(x) / 2).softmax(1)
    soft = sum(gates[:, e, None] * expert(x) for e, expert in enumerate(model.experts))
    weight = torch.rand(5, 3, dtype=torch.float64)
    expected, found = (torch.autograd.grad((weight * y).sum(), [x])[0] for y in (soft, view(x)))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(every_expert(model, x), torch.stack([expert(x) for expert in model.experts]))
    with pytest.raises(ValueError, match=r"^temperature must be above 0, got 0$"):
        SoftBackward(model, 0)


def test_router_logits_let_an_attack_flip_the_route() -> None:
    model = hidden_weakness()
    x, chosen = torch.full((3, 4), 0.4), torch.zeros(3, dtype=torch.int64)
    x_adv = APGD(RouterLogits(model), 0.15, steps=10, loss="margin", seed=0)(x, chosen)
    assert (model.route(x_adv).experts == 2).all()


@pytest.mark.parametrize("attack", [ExpertAttack, JointAttack, RouterLogits, SoftBackward])
def test_the_examples_run_and_plain_models_are_refused(attack: type) -> None:
    """On the mixture with a hidden weakness each example breaks it, or flips its route."""
    example = textwrap.dedent(inspect.cleandoc(attack.__doc__).split("Example:\n")[1]).replace("8/255", "3/20")
    names = {"model": hidden_weakness(), "x": torch.full((3, 4), 0.4), "y": torch.zeros(3, dtype=torch.int64)}
    exec(example, vars(moe_kernels) | names, names)
    x_adv, model = names["x_adv"], names["model"]
    assert (model.route(x_adv).experts == 2).all() and (model(x_adv).argmax(1) == 1).all()
    with pytest.raises(ValueError, match=r"^model must be a mixture of experts, got Linear without num_experts$"):
        attack(nn.Linear(4, 3))


def test_attacks_on_a_trained_mixture(robust_digits: tuple[RobustClassifier, Split]) -> None:
    model, images = robust_digits
    x, y = images.x, images.y
    clean = model(x).argmax(1) == y
    plain = model(APGD(model, 0.15, steps=15, seed=0)(x, y)).argmax(1) == y
    for attack in (
        ExpertAttack(model, 0.15, steps=15, seed=0),
        ExpertAttack(model, torch.full((120,), 0.15), steps=15, restarts=2, seed=0),
        JointAttack(model, "3/20", steps=15, seed=0),
        APGD(SoftBackward(model), 0.15, steps=15, loss="margin", seed=0),
    ):
        x_adv = attack(x, y)
        robust = model(x_adv).argmax(1) == y
        assert (x_adv - x).abs().max() <= 0.15 and not x_adv.requires_grad
        assert robust.sum() < clean.sum() and (robust & plain).sum() <= plain.sum()
        assert attack.nan_gradients == 0
        assert not model.training and all(p.requires_grad for p in model.parameters())
    assert (model(ExpertAttack(model, 0.15, steps=15, seed=0)(x, y)).argmax(1) == y).sum() <= plain.sum() + 3
