"""How many attacks an evaluation tries, and how strong each is. Imports no torch."""

from dataclasses import dataclass
from fractions import Fraction

from rter.errors import UserError
from rter.seeds import seed_for

NORMS = ("Linf", "L2", "L1")
RESTARTS = {"pgd": 1, "quick": 5, "full": 20}  # of PGD on the whole model, in each suite
BATCH = 512
QUERIES = 5000  # of Square, as in AutoAttack's standard ensemble


@dataclass(frozen=True)
class Effort:
    """How many attacks are tried, and how long each.

    Args:
        suite: "pgd", which is that alone, "quick" or "full"; see rter.suite.
        steps: of PGD and APGD.
        restarts: of PGD on the whole model; None for those of the suite.
        queries: of AutoAttack's Square.
    """

    suite: str = "full"
    steps: int = 50
    restarts: int | None = None
    queries: int = QUERIES

    @property
    def full(self) -> bool:
        return self.suite == "full"

    @property
    def whole_restarts(self) -> int:
        return self.restarts or RESTARTS[self.suite]


@dataclass(frozen=True, kw_only=True)
class Strength(Effort):
    """How a model is attacked.

    Args:
        eps: radius of the perturbation of images in [0, 1].
        norm: "Linf", "L2" or "L1".
        alpha_ratio: step size of PGD, relative to eps.
        batch_size: images that are attacked at a time; random starts, and so what is found, depend on it.
        seed: of all random draws.
    """

    eps: float
    norm: str = "Linf"
    alpha_ratio: float = 0.25
    batch_size: int = BATCH
    seed: int = 0

    def seed_for(self, *purpose: str | int) -> int:
        return seed_for(self.seed, *purpose)


def make_strength(
    eps: float | str,
    norm: str,
    suite: str,
    bounds: tuple[float, float],
    batch_size: int,
    seed: int,
    steps: int,
    restarts: int | None,
    queries: int,
) -> Strength:
    """The strength of an evaluation, from the arguments of `rter.evaluate_model`.

    Raises:
        UserError: if an argument, which the message names, is not as described there.
    """
    if norm not in NORMS:
        raise UserError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if suite not in RESTARTS:
        raise UserError(f"suite must be one of {', '.join(RESTARTS)}, got {suite!r}")
    try:
        low, high = map(float, bounds)
        valid = low < high
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise UserError(f"bounds must be (low, high) with low < high, got {bounds!r}")
    try:
        radius = float(Fraction(eps)) if isinstance(eps, str) else float(eps)
        valid = 0 < radius < float("inf")
    except (TypeError, ValueError, ZeroDivisionError):
        valid = False
    if not valid:
        raise UserError(f"eps must be a number above 0 or a fraction such as 8/255, got {eps!r}")
    if norm == "Linf" and radius > high - low:
        raise UserError(
            f"eps must be at most {high - low:g}, the width of bounds {bounds}, got {eps}; write 8/255, not 8"
        )
    for name, count in (("batch_size", batch_size), ("steps", steps), ("restarts", restarts), ("queries", queries)):
        if count is not None and not (isinstance(count, int) and count > 0):
            raise UserError(f"{name} must be a whole number above 0, got {count!r}")
    if not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed must be a whole number, at least 0, got {seed!r}")
    radius /= high - low
    return Strength(suite, steps, restarts, queries, eps=radius, norm=norm, batch_size=batch_size, seed=seed)
