"""The attacks that an evaluation consists of, and the tally of what withstands them all.

    quick    PGD with restarts, and with fewer on each expert, on the experts' mean and on the router; APGD-CE and
             APGD-DLR; each expert together with the route to it
    full     also APGD-T, that attack with another weight, the joint attack, soft gradients at three temperatures, and
             AutoAttack's standard ensemble, whose Square is the black box of the suite

An L1 evaluation has no APGD, nor the attacks built on it. A model that says two things of one image is attacked through
the mean of 20 draws.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels.attacks import APGD, ExpertAttack, JointAttack, SoftBackward
from rter.config import Config
from rter.data import Split
from rter.methods.step import make_attack

RESTARTS = {"quick": 5, "full": 20}  # of PGD on the whole model, in each suite
BATCH = 512
DRAWS = 20
TEMPERATURES = (1.0, 4.0, 16.0)

Find = Callable[[Tensor, Tensor], Tensor]  # x [B, C, H, W], y [B] -> x_adv


@dataclass(frozen=True)
class Attacked:
    """The images that an attack found, and whether it failed to change each prediction from the label."""

    x: Tensor  # [n, C, H, W]
    robust: Tensor  # [n] bool


class Tally:
    """Which images are read rightly and withstand every attack so far, and how many withstand each attack alone."""

    def __init__(self, model: nn.Module, images: Split) -> None:
        self.model, self.images = model, images
        self.robust = predict(model, images.x) == images.y
        self.each: dict[str, Tensor] = {}

    def add(self, name: str, x_adv: Tensor) -> Tensor:
        """Judges the images [n, C, H, W] that an attack has found; returns which of them withstood it, [n]."""
        clean = predict(self.model, self.images.x) == self.images.y
        self.each[name] = clean & (predict(self.model, x_adv) == self.images.y)
        self.robust = self.robust & self.each[name]
        return self.each[name]

    @property
    def worst(self) -> str:
        """The strongest single attack."""
        return min(self.each, key=lambda name: int(self.each[name].sum()))

    def accuracies(self) -> dict[str, float]:
        return {name: mean(robust) for name, robust in self.each.items()}


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(BATCH)]).argmax(-1)


def mean(flags: Tensor) -> float:
    return flags.double().mean().item()


def attack(
    model: nn.Module, config: Config, images: Split, name: str, *, eps: float, steps: int, restarts: int = 1
) -> Attacked:
    """PGD with restarts: each further start is spent only on the images that have withstood so far."""
    x, robust = images.x.clone(), predict(model, images.x) == images.y
    rows = torch.arange(len(images), device=images.y.device)
    for restart in range(restarts):
        for i, part in enumerate(rows[robust | (restart == 0)].split(BATCH)):
            pgd = make_attack(model, config, eps, steps, name, restart, i)
            x[part] = pgd(images.x[part], images.y[part])
            robust[part] &= predict(model, x[part]) == images.y[part]
    return Attacked(x, robust)


def found_by(find: Find, model: nn.Module, images: Split) -> Tensor:
    """What an attack makes of the images [n, C, H, W]; those misread as they are stay so."""
    x = images.x.clone()
    for part in (predict(model, x) == images.y).nonzero()[:, 0].split(BATCH):
        x[part] = find(images.x[part], images.y[part])
    return x


def apgd_attacks(model: nn.Module, config: Config, images: Split, steps: int, full: bool) -> dict[str, Find]:
    """The suite's attacks that are built on APGD, by name."""
    if config.norm == "L1":
        return {}
    with torch.no_grad():
        num_classes = model(images.x[:1]).shape[1]
    draws = 1 if is_deterministic(model, images.x[:BATCH]) else DRAWS

    def options(name: str) -> dict[str, Any]:
        return {"norm": config.norm, "seed": config.seed_for("suite", name), "draws": draws}

    def apgd(target: nn.Module, name: str, loss: str) -> Find:
        return APGD(target, config.eps, steps, loss, **options(name))

    several = int(model.num_experts) > 1  # type: ignore[arg-type]
    attacks: dict[str, Find] = {"apgd-ce": apgd(model, "apgd-ce", "ce")}
    if num_classes >= 3:
        attacks["apgd-dlr"] = apgd(model, "apgd-dlr", "dlr")
    if num_classes >= 4 and full:
        attacks["apgd-t"] = apgd(model, "apgd-t", "dlr_targeted")
    for weight in (0.1, 0.3) if full else (0.1,):
        if several:
            name = f"expert and route, weight {weight}"
            attacks[name] = ExpertAttack(model, config.eps, steps, weight, **options(name))
    if several and full:
        attacks["joint"] = JointAttack(model, config.eps, steps, **options("joint"))
        for temperature in TEMPERATURES:
            name = f"soft gradient, temperature {temperature:g}"
            attacks[name] = apgd(SoftBackward(model, temperature), name, "margin")
    return attacks


@torch.no_grad()
def is_deterministic(model: nn.Module, x: Tensor) -> bool:
    """Whether five forwards say the same, bit for bit."""
    first = model(x)
    return all(torch.equal(first, model(x)) for _ in range(4))
