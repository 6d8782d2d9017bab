"""The curves of an evaluation: accuracy against eps and, for a dual model, against alpha."""

from typing import Any

from torch import Tensor, nn

from rter.alpha import alpha_curve, alpha_flags
from rter.attack import make_attack
from rter.evaluation import Evaluation, mean, predict
from rter.models.classifier import DualClassifier

CURVE = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)  # relative to the evaluation's eps


def eps_curve(evaluation: Evaluation, robust: Tensor) -> list[list[float]]:
    """Accuracy against eps. `robust` holds the images known to withstand the evaluation's own eps."""
    strength, standing = evaluation.strength, evaluation.clean.clone()
    curve = [[0.0, mean(standing)]]
    for ratio in (1.0,) if strength.suite == "pgd" else CURVE:
        eps = ratio * strength.eps
        if strength.norm == "Linf" and eps > 1:
            break
        if ratio == 1:
            standing = standing & robust
        else:
            standing = evaluation.pgd(evaluation.model, f"curve {ratio}", eps=eps, among=standing).robust
        curve.append([eps, mean(standing)])
    return curve


def mixing_curve(evaluation: Evaluation) -> dict[str, Any]:
    """The curve of a dual model over alpha, as `alpha_curve`; empty for other models and in the suite "pgd"."""
    model, strength = evaluation.model, evaluation.strength
    if not isinstance(model, DualClassifier) or strength.suite == "pgd":
        return {}

    def compute(part: Tensor) -> dict[str, Tensor]:
        x, y = evaluation.x[part], evaluation.y[part]

        def attack(model: nn.Module) -> Tensor:
            return make_attack(model, strength, strength.eps, strength.steps, "alpha", int(part[0]))(x, y)

        return {"flags": alpha_flags(model, x, y, attack, predict)}

    return {"alpha_curve": alpha_curve(evaluation.of_each("alpha", evaluation.everything, compute)["flags"])}
