"""The attacks of an evaluation that are built on APGD.

    pgd      none: PGD on the whole model alone
    quick    APGD-CE and APGD-DLR; each expert together with the route to it
    full     also APGD-T, that attack with another weight, the joint attack, and soft gradients at three temperatures

In the L1 norm there is none, and without experts none on a route. A model whose output is random is attacked through
the mean of 20 draws.
"""

from typing import Any

import torch
from torch import nn

from moe_kernels import APGD, ExpertAttack, JointAttack, SoftBackward
from rter.evaluation import Evaluation, Find

DRAWS = 20
TEMPERATURES = (1.0, 4.0, 16.0)


def apgd_attacks(evaluation: Evaluation) -> dict[str, Find]:
    """The attacks by name."""
    model, strength = evaluation.model, evaluation.strength
    if strength.norm == "L1" or strength.suite == "pgd":
        return {}
    with torch.no_grad():
        num_classes = model(evaluation.x[:1]).shape[1]
    draws = 1 if is_deterministic(evaluation) else DRAWS

    def options(name: str) -> dict[str, Any]:
        return {"norm": strength.norm, "seed": strength.seed_for("suite", name), "draws": draws}

    def apgd(target: nn.Module, name: str, loss: str) -> Find:
        return APGD(target, strength.eps, steps=strength.steps, loss=loss, **options(name))

    attacks: dict[str, Find] = {"apgd-ce": apgd(model, "apgd-ce", "ce")}
    if num_classes >= 3:
        attacks["apgd-dlr"] = apgd(model, "apgd-dlr", "dlr")
    if num_classes >= 4 and strength.full:
        attacks["apgd-t"] = apgd(model, "apgd-t", "dlr_targeted")
    if not evaluation.several:
        return attacks
    for weight in (0.1, 0.3) if strength.full else (0.1,):
        name = f"expert and route, weight {weight}"
        attacks[name] = ExpertAttack(model, strength.eps, steps=strength.steps, weight=weight, **options(name))
    if strength.full:
        attacks["joint"] = JointAttack(model, strength.eps, steps=strength.steps, **options("joint"))
        for temperature in TEMPERATURES:
            name = f"soft gradient, temperature {temperature:g}"
            attacks[name] = apgd(SoftBackward(model, temperature), name, "margin")
    return attacks


@torch.no_grad()
def is_deterministic(evaluation: Evaluation) -> bool:
    """Whether five forwards of the first images give the same logits, bit for bit."""

    def five() -> dict[str, bool]:
        x = evaluation.x[: evaluation.strength.batch_size]
        first = evaluation.model(x)
        return {"same": all(torch.equal(first, evaluation.model(x)) for _ in range(4))}

    same: bool = evaluation.journal.part("deterministic", five)["same"]
    return same
