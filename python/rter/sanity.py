"""Signs that an attack is too weak or a gradient is hidden; docs/evaluation.md explains each."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rter.evaluation import Evaluation, mean
from rter.suite import is_deterministic


@dataclass(frozen=True)
class Seen:
    """What the attacks of an evaluation found: [n] bool each, or None if there was no such attack.

    Args:
        whole: images that withstand PGD on the whole model.
        route: images that keep their expert under PGD on the router.
        certified: images whose route provably cannot change.
        gradients: images that withstand all gradient attacks.
        square: images that withstand Square by itself.
        flags: AutoAttack's warnings.
    """

    whole: Tensor
    route: Tensor | None = None
    certified: Tensor | None = None
    gradients: Tensor | None = None
    square: Tensor | None = None
    flags: list[str] | None = None


def sanity(evaluation: Evaluation, seen: Seen) -> dict[str, dict[str, Any]]:
    """For each check whether it passed, and its value."""
    strength, count = evaluation.strength, len(evaluation.y)
    checks: dict[str, tuple[bool, Any]] = {"deterministic": (is_deterministic(evaluation), None)}
    if seen.certified is not None and seen.route is not None:
        flipped = int((~seen.route & seen.certified).sum())
        checks["no certified route was flipped"] = flipped == 0, flipped
    if strength.full:
        size = evaluation.x[0].numel()
        everything = {"Linf": 1.0, "L2": size**0.5, "L1": float(size)}[strength.norm]
        unbounded = mean(
            evaluation.pgd(evaluation.model, "unbounded", among=evaluation.clean, eps=everything, restarts=3).robust
        )
        checks["no image withstands an unbounded attack"] = unbounded == 0, unbounded
        more = evaluation.pgd(evaluation.model, "more", steps=2 * strength.steps, among=seen.whole)
        gain = int((seen.whole & ~more.robust).sum()) / count
        checks["twice the steps gain PGD at most 1 point"] = gain <= 0.01, gain
    if seen.gradients is not None and seen.square is not None:
        few = max(1, round(0.002 * count))  # AutoAttack allows 0.2 %
        more_left = int(seen.square.sum() - seen.gradients.sum())
        others = int((seen.gradients & ~seen.square).sum())
        checks["gradients break at least as many images as Square"] = more_left >= 0, more_left
        checks["at most 0.2 % of the images, or one, fall to Square only"] = others <= few, others
    if seen.flags is not None:
        checks["AutoAttack raises no flag"] = not seen.flags, len(seen.flags)
    return {name: {"passed": passed, "value": value} for name, (passed, value) in checks.items()}
