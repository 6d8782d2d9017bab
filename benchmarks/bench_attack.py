"""PGD on a dense ResNet-18, beside eager torch and the attack libraries that are installed."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from conftest import BF16, Contest
from peers import pgd_step
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import PGD
from moe_kernels.testing import Source
from moe_kernels.testing.networks import ResNet18

EPS, ALPHA = 8 / 255, 2 / 255
LIBRARIES = [name for name in ("torchattacks", "foolbox") if find_spec(name)]  # which `make` installs


def model_and_images(batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    s = Source(torch.float32)
    return ResNet18().eval(), s.rand(batch, 3, 32, 32), s.randint(10, batch).long()


def attack_of_library(name: str, model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """From x itself."""
    if name == "torchattacks":
        import torchattacks

        return torchattacks.PGD(model, EPS, ALPHA, steps, random_start=False)(x, y)
    import foolbox

    attack = foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=steps, random_start=False)
    return attack(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=EPS)[1]


def attack(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    return PGD(model, EPS, ALPHA, steps, random_start=False, best_iterate=False)(x, y)


def eager_attack(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """The gradients of the parameters, which nobody froze, included."""
    x_adv = x
    for _ in range(steps):
        x_adv = x_adv.clone().requires_grad_()
        model.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        x_adv = pgd_step(x_adv.detach(), x_adv.grad, x, EPS, ALPHA)  # type: ignore[arg-type]
    return x_adv


def autocast(function: Callable[[], Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return function()


@pytest.mark.parametrize("name", ["moe_kernels", "eager, parameters trainable", *LIBRARIES])
def test_fp32(contest: Contest, name: str) -> None:
    """Several steps, since batch norms are folded from the second on."""
    inputs = model_and_images(32)
    attacks = {"moe_kernels": partial(attack, *inputs), "eager, parameters trainable": partial(eager_attack, *inputs)}
    attacks |= {library: partial(attack_of_library, library, *inputs) for library in LIBRARIES}
    different = (attacks[name](steps=1) != eager_attack(*inputs, steps=1)).float().mean()
    assert different < 0.001, f"one step differs in {different:.1%} of the pixels"  # later ones amplify rounding
    contenders = {other: partial(attack, steps=10) for other, attack in attacks.items()}
    targets = {"eager, parameters trainable": ">= 1.7", "torchattacks": ">= 1.6", "foolbox": ">= 1.6"}
    contest("PGD-10 on a ResNet-18, 32 images, fp32", contenders, name, targets=targets)


@pytest.mark.parametrize("name", ["moe_kernels", "eager in bf16", "eager in fp32"])
def test_bf16(contest: Contest, name: str) -> None:
    inputs, steps = model_and_images(4), 5
    eager = partial(eager_attack, *inputs, steps=steps)
    contenders = {
        "moe_kernels": partial(autocast, partial(attack, *inputs, steps=steps)),
        "eager in bf16": partial(autocast, eager),
        "eager in fp32": eager,
    }
    targets = {"eager in bf16": ">= 1.7", "eager in fp32": ">= 3.4"}
    contest("PGD-5 on a ResNet-18, 4 images, bf16", contenders, name, targets=targets, rounds=None if BF16 else 1)
