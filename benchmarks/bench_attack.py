"""PGD on networks as users write them, against eager torch in three variants, torch.compile and attack libraries."""

import copy
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from conftest import BF16, MAX_GRADIENT_ERROR, Contest, direction, second_step
from peers import pgd_step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from moe_kernels import PGD
from moe_kernels.testing import Source
from moe_kernels.testing.networks import ResNet18, ViT, randomize_statistics

EPS, ALPHA = 8 / 255, 2 / 255
# `make` installs two of them; adv_lib needs torchvision
LIBRARIES = [name for name in ("torchattacks", "foolbox", "adv_lib") if find_spec(name)]
MAX_MOVED_OTHERWISE = {torch.float32: 0.001, torch.bfloat16: 0.1}  # fraction of pixels whose gradient flips its sign
TRAINABLE, FROZEN, COMPILED = "eager, parameters trainable", "eager, frozen", "torch.compile, frozen"
BY_HAND = "eager by hand: frozen, norms folded, channels-last"
BOTH_BY_HAND = "the same, and ours on the same folded network"
RECOMPUTED = 'ours with recompute="activations"'

Attack = Callable[..., Tensor]


class FromTransformers(nn.Module):
    """An untrained network of ten classes from transformers, which returns logits."""

    def __init__(self, name: str, size: int, **settings: Any) -> None:
        super().__init__()
        import transformers

        config = getattr(transformers, f"{name}Config")(image_size=size, num_labels=10, **settings)
        self.net = getattr(transformers, f"{name}ForImageClassification")(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).logits


VIT_S = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "ResNet-18": lambda size: ResNet18(),
    "ResNet-18 of width 16": lambda size: ResNet18(width=16),
    "ViT-S/16 with 4 blocks": lambda size: ViT(size, depth=4),
    "ViT-S/16": lambda size: FromTransformers("ViT", size, **VIT_S),
    "ConvNeXt-T": lambda size: FromTransformers("ConvNext", size),
    "Swin-T": lambda size: FromTransformers("Swin", size, window_size=7 if size == 224 else 2),
    "MobileNetV2": lambda size: FromTransformers("MobileNetV2", size),
    "ResNet-50": lambda size: FromTransformers("ResNet", size),
}


class Case(NamedTuple):
    network: str
    images: int
    size: int
    steps: int
    targets: dict[str, str]  # by rival; those whose library is not installed are skipped

    def __str__(self) -> str:
        attack = "one step" if self.steps == 1 else f"PGD-{self.steps}"
        return f"{attack} on a {self.network}, {self.images} images of {self.size} pixels"


OTHERS = {FROZEN: ">= 1", BY_HAND: ">= 0.95", BOTH_BY_HAND: ">= 0.95"}
LIBRARY_TARGETS = dict.fromkeys(("torchattacks", "foolbox", "adv_lib"), ">= 1.6")
CORE = [
    Case("ResNet-18", 32, 32, 1, {TRAINABLE: ">= 1.6", FROZEN: ">= 1", BY_HAND: ">= 1.15", COMPILED: ""}),
    Case(
        "ResNet-18",
        32,
        32,
        10,
        {TRAINABLE: ">= 2.4", FROZEN: ">= 1", BY_HAND: ">= 1.5", BOTH_BY_HAND: ">= 1.5", COMPILED: ""}
        | LIBRARY_TARGETS,
    ),
    *(Case("ResNet-18 of width 16", 8, 32, steps, OTHERS) for steps in (1, 10)),
    Case("ViT-S/16 with 4 blocks", 2, 224, 3, {FROZEN: ">= 1", RECOMPUTED: ""}),
]
REST = [
    *(Case("ResNet-18", images, 32, steps, OTHERS) for images in (1, 2, 8) for steps in (1, 10)),
    *(Case("ResNet-18", 2, size, 3, OTHERS) for size in (64, 224)),
    *(Case("ResNet-18 of width 16", images, 32, steps, OTHERS) for images in (1, 2, 32) for steps in (1, 10)),
    *(
        Case(name, 2, size, 3, OTHERS | {COMPILED: ""})
        for name in ("ViT-S/16", "ConvNeXt-T", "Swin-T", "MobileNetV2", "ResNet-50")
        for size in (64, 224)
        if find_spec("transformers")
    ),
]


def cases(of: list[Case]) -> list[Any]:
    """Each case with our contender and with each rival."""
    missing = [name for name in LIBRARY_TARGETS if name not in LIBRARIES]
    return [
        pytest.param(case, name, id=f"{name}-{case}")
        for case in of
        for name in ("moe_kernels", *(rival for rival in case.targets if rival not in missing))
    ]


@cache
def model_and_images(network: str, images: int, size: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    s = Source(torch.float32)
    model = randomize_statistics(NETWORKS[network](size)).eval()
    return model, s.rand(images, 3, size, size), s.randint(10, images).long()


def attack_of_library(name: str, model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """PGD of the library, started at x itself."""
    if name == "torchattacks":
        import torchattacks

        return torchattacks.PGD(model, EPS, ALPHA, steps, random_start=False)(x, y)
    if name == "adv_lib":
        from adv_lib.attacks import pgd_linf

        return pgd_linf(model, x, y, EPS, steps=steps, random_init=False, relative_step_size=ALPHA / EPS)
    import foolbox

    attack = foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=steps, random_start=False)
    return attack(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=EPS)[1]


def attack(model: nn.Module, x: Tensor, y: Tensor, steps: int, recompute: str = "none") -> Tensor:
    return PGD(model, EPS, ALPHA, steps, random_start=False, best_iterate=False, recompute=recompute)(x, y)


def eager_attack(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """PGD that also computes the gradients of the parameters, since nobody froze them."""
    x_adv = x
    for _ in range(steps):
        x_adv = x_adv.clone().requires_grad_()
        model.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        x_adv = pgd_step(x_adv.detach(), x_adv.grad, x, EPS, ALPHA)  # type: ignore[arg-type]
    return x_adv


def frozen_attack(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    x_adv = x
    for _ in range(steps):
        x_adv = x_adv.clone(memory_format=torch.preserve_format).requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), [x_adv])
        x_adv = pgd_step(x_adv.detach(), grad, x, EPS, ALPHA)
    return x_adv


def channels_last(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    return attack(model, x.contiguous(memory_format=torch.channels_last), y, steps)


def frozen(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False)


def by_hand(model: nn.Module) -> nn.Module:
    """The frozen model in channels-last, with each batch norm folded into the convolution registered before it."""
    model = frozen(model)
    for module in list(model.modules()):
        children = list(module.named_children())
        for (name, conv), (norm_name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return model.to(memory_format=torch.channels_last)


@cache
def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(frozen(model))  # type: ignore[return-value]


# For each contender, what is done to the model before the timing, and the attack that is timed.
CONTENDERS: dict[str, tuple[Callable[[nn.Module], nn.Module], Attack]] = {
    "moe_kernels": (lambda model: model, attack),
    RECOMPUTED: (lambda model: model, partial(attack, recompute="activations")),
    TRAINABLE: (lambda model: model, eager_attack),
    FROZEN: (frozen, frozen_attack),
    **dict.fromkeys((BY_HAND, BOTH_BY_HAND), (by_hand, partial(channels_last, frozen_attack))),
    COMPILED: (compiled, frozen_attack),
    **{name: (lambda model: model, partial(attack_of_library, name)) for name in LIBRARIES},
}


def in_bf16(attack: Attack, *inputs: object, **settings: object) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return attack(*inputs, **settings)


def check(
    attack: Attack, model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype, like: nn.Module | None = None
) -> None:
    """Checks the start of the second step, and its gradient against fp64; later steps amplify rounding."""
    exact = copy.deepcopy(like or model).double()
    x_adv, found = second_step(model, partial(attack, model, x, y, steps=2))
    x = x.double()
    moved = (x_adv - pgd_step(x, direction(exact, x, y), x, EPS, ALPHA)).abs() > ALPHA / 2
    assert moved.double().mean() <= MAX_MOVED_OTHERWISE[dtype], (
        f"the first step moves {moved.sum()} pixels the wrong way"
    )
    error = (found - direction(exact, x_adv, y)).norm()
    assert error <= MAX_GRADIENT_ERROR[dtype], f"the second gradient is wrong by {error:.1e}"


def compare(contest: Contest, case: Case, name: str) -> None:
    model, x, y = model_and_images(case.network, case.images, case.size)
    contenders = {other: CONTENDERS[other] for other in ("moe_kernels", name)}
    if name == BOTH_BY_HAND:
        contenders["moe_kernels"] = by_hand, partial(channels_last, attack)
    prepared = {other: (prepare(model), run) for other, (prepare, run) in contenders.items()}
    for net, run in prepared.values():
        check(run, net, x[:2], y[:2], torch.float32, model)
    timed = {other: partial(run, net, x, y, steps=case.steps) for other, (net, run) in prepared.items()}
    contest(f"{case}, fp32", timed, name, targets=case.targets)


@pytest.mark.core
@pytest.mark.parametrize("case, name", cases(CORE))
def test_core(contest: Contest, case: Case, name: str) -> None:
    compare(contest, case, name)


@pytest.mark.parametrize("case, name", cases(REST))
def test_rest(contest: Contest, case: Case, name: str) -> None:
    compare(contest, case, name)


@pytest.mark.parametrize("name", ["moe_kernels", "eager in bf16", "eager in fp32"])
def test_bf16(contest: Contest, name: str) -> None:
    model, x, y = model_and_images("ResNet-18", 4, 32)
    attacks = {"moe_kernels": partial(in_bf16, attack), "eager in bf16": partial(in_bf16, eager_attack)}
    attacks["eager in fp32"] = eager_attack
    check(attacks[name], model, x[:2], y[:2], torch.float32 if name == "eager in fp32" else torch.bfloat16)
    contenders = {other: partial(attack, model, x, y, steps=5) for other, attack in attacks.items()}
    targets = {"eager in bf16": ">= 1.7", "eager in fp32": ">= 3.4"}
    contest("PGD-5 on a ResNet-18, 4 images, bf16", contenders, name, targets=targets, rounds=None if BF16 else 1)
