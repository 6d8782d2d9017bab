"""AutoAttack's standard ensemble (Croce and Hein 2020) through pyautoattack, and the flags that it raises."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moe_kernels import attack_mode
from rter.errors import UserError
from rter.evaluation import Evaluation, says
from rter.journal import Found


def auto_attack(evaluation: Evaluation) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Runs APGD-CE, APGD-T, FAB-T and Square, each on what the attacks before it left; records each, and the ensemble.

    With fewer than four classes, for which targeted DLR is undefined, runs APGD-CE, FAB and Square.

    Returns:
        which images withstand the ensemble, its white-box attacks, and Square by itself, each [n] bool; and the flags
        raised. Square is tried on what the white-box attacks broke only if it broke anything else, since otherwise it
        cannot have broken more images than they did.
    """
    with torch.no_grad():
        num_classes = evaluation.model(evaluation.x[:1]).shape[1]
    white = ["apgd-ce", "apgd-t", "fab-t"] if num_classes >= 4 else ["apgd-ce", "fab"]
    left, flags = evaluation.clean.clone(), set[str]()

    def run(name: str, tried: Tensor, label: str = "") -> Tensor:
        right, rows = evaluation.clean.clone(), tried.nonzero()[:, 0]
        parts = evaluation.batches(
            f"autoattack {name}{label}", rows, lambda part: _batch(evaluation, name, part, num_classes)
        )
        for part, found in parts:
            right[part] = found["right"]
            flags.update(found["flags"])
        return right

    for name in [*white, "square"]:
        tried = left.clone()
        right = run(name, tried)
        label = "square" if name == "square" else f"autoattack {name}"
        evaluation.record(label, tried, right, among=tried, parts=f"autoattack {name}/")
        if name != "square":
            left &= right
    square, ensemble = right, left & right
    if not square.equal(evaluation.clean):
        square = square & run("square", evaluation.clean & ~left, " on the others")
    evaluation.record("autoattack", evaluation.clean, ensemble, parts="autoattack ")
    return ensemble, left, square, sorted(flags)


def _batch(evaluation: Evaluation, name: str, part: Tensor, num_classes: int) -> Found:
    """One attack of the ensemble on one batch of images that the model classifies correctly."""
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        raise UserError("the full suite needs the package pyautoattack: install it, or give --suite quick") from None
    strength, x, y = evaluation.strength, evaluation.x[part], evaluation.y[part]
    seed = strength.seed_for("autoattack") % 2**31
    with attack_mode(evaluation.model), _flags() as flags:
        ensemble: Any = AutoAttack(evaluation.model, norm=strength.norm, eps=strength.eps, seed=seed, device=x.device)
        targets = min(ensemble.apgd_targeted.n_target_classes, num_classes - 1)
        ensemble.apgd_targeted.n_target_classes = ensemble.fab.n_target_classes = targets
        ensemble.square.n_queries = strength.queries
        ensemble.attacks_to_run = [name]
        x_adv = ensemble.run_standard_evaluation(x, y, batch_size=len(x))[0]
    return {"right": says(evaluation.model, x_adv, y), "flags": sorted(set(flags))}


@contextmanager
def _flags() -> Iterator[list[str]]:
    """Collects pyautoattack's warnings, from its logger and from Python's."""
    flags: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            flags.append(record.getMessage())

    logger, collect = logging.getLogger("auto-attack"), Collect(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(collect)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield flags
            flags += [str(warning.message) for warning in caught]
    finally:
        logger.removeHandler(collect)
        logger.propagate = propagate
