"""PGD on a dense ResNet-18 and on a transformer, beside eager torch and the attack libraries that are installed."""

import copy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from conftest import BF16, MAX_GRADIENT_ERROR, Contest, direction, second_step
from peers import pgd_step
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import PGD
from moe_kernels.testing import Source
from moe_kernels.testing.networks import ResNet18, ViT, randomize_statistics

EPS, ALPHA = 8 / 255, 2 / 255
# `make` installs two of them; adv_lib needs torchvision
LIBRARIES = [name for name in ("torchattacks", "foolbox", "adv_lib") if find_spec(name)]
MAX_MOVED_OTHERWISE = {torch.float32: 0.001, torch.bfloat16: 0.1}  # of the pixels, by a gradient of the other sign

Attack = Callable[..., Tensor]


def model_and_images(batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    s = Source(torch.float32)
    return randomize_statistics(ResNet18()).eval(), s.rand(batch, 3, 32, 32), s.randint(10, batch).long()


def attack_of_library(name: str, model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """From x itself."""
    if name == "torchattacks":
        import torchattacks

        return torchattacks.PGD(model, EPS, ALPHA, steps, random_start=False)(x, y)
    if name == "adv_lib":
        from adv_lib.attacks import pgd_linf

        return pgd_linf(model, x, y, EPS, steps=steps, random_init=False, relative_step_size=ALPHA / EPS)
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


def in_bf16(attack: Attack, *inputs: object, **settings: object) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return attack(*inputs, **settings)


def check(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype) -> None:
    """The second step begins where it should, with the gradient of fp64 there; later ones amplify rounding."""
    exact = copy.deepcopy(model).double()
    x_adv, found = second_step(model, partial(attack, model, x, y, steps=2))
    x = x.double()
    moved = (x_adv - pgd_step(x, direction(exact, x, y), x, EPS, ALPHA)).abs() > ALPHA / 2
    assert moved.double().mean() <= MAX_MOVED_OTHERWISE[dtype], f"the first step moves {moved.sum()} pixels otherwise"
    error = (found - direction(exact, x_adv, y)).norm()
    assert error <= MAX_GRADIENT_ERROR[dtype], f"the second gradient is wrong by {error:.1e}"


@pytest.mark.parametrize("name", ["moe_kernels", "eager, parameters trainable", *LIBRARIES])
def test_fp32(contest: Contest, name: str) -> None:
    model, x, y = model_and_images(32)
    attacks = {"moe_kernels": attack, "eager, parameters trainable": eager_attack}
    attacks |= {library: partial(attack_of_library, library) for library in LIBRARIES}
    check(attacks[name], model, x[:2], y[:2], torch.float32)
    contenders = {other: partial(attack, model, x, y, steps=10) for other, attack in attacks.items()}
    targets = dict.fromkeys(("torchattacks", "foolbox", "adv_lib"), ">= 1.6")
    targets = {"eager, parameters trainable": ">= 1.7"} | targets
    contest("PGD-10 on a ResNet-18, 32 images, fp32", contenders, name, targets=targets)


@pytest.mark.parametrize("name", ["moe_kernels", "eager, parameters trainable"])
def test_vit(contest: Contest, name: str) -> None:
    """Which keeps an eighth of what eager keeps and computes much of it again."""
    torch.manual_seed(0)
    s = Source(torch.float32)
    model, x, y = ViT(depth=4).eval(), s.rand(2, 3, 224, 224), s.randint(10, 2).long()
    attacks = {"moe_kernels": attack, "eager, parameters trainable": eager_attack}
    check(attacks[name], model, x, y, torch.float32)
    contenders = {other: partial(attack, model, x, y, steps=3) for other, attack in attacks.items()}
    contest("PGD-3 on a ViT-S/16 with 4 blocks, 2 images, fp32", contenders, name)


@pytest.mark.parametrize("name", ["moe_kernels", "eager in bf16", "eager in fp32"])
def test_bf16(contest: Contest, name: str) -> None:
    model, x, y = model_and_images(4)
    attacks = {"moe_kernels": partial(in_bf16, attack), "eager in bf16": partial(in_bf16, eager_attack)}
    attacks["eager in fp32"] = eager_attack
    check(attacks[name], model, x[:2], y[:2], torch.float32 if name == "eager in fp32" else torch.bfloat16)
    contenders = {other: partial(attack, model, x, y, steps=5) for other, attack in attacks.items()}
    targets = {"eager in bf16": ">= 1.7", "eager in fp32": ">= 3.4"}
    contest("PGD-5 on a ResNet-18, 4 images, bf16", contenders, name, targets=targets, rounds=None if BF16 else 1)
