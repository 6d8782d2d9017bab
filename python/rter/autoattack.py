"""AutoAttack's standard ensemble (Croce and Hein 2020) through pyautoattack, and the flags that it raises."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels.attacks import attack_mode
from rter.data import Split
from rter.errors import UserError
from rter.suite import predict

QUERIES = 5000  # of Square, as in the standard ensemble


def auto_attack(
    model: nn.Module, images: Split, norm: str, eps: float, seed: int, queries: int = QUERIES
) -> tuple[Tensor, Tensor, list[str]]:
    """Runs APGD-CE, APGD-T and FAB-T, each on what is left by those before it, and Square.

    Returns:
        the images [n, C, H, W] after the three white-box attacks, those of Square by itself, and the flags raised. The
        ensemble is the union of the two: Square's run on what the three leave is that of the ensemble, and what they
        break it attacks in a run of its own, for comparison. With fewer than four classes, where targeted DLR is not
        defined, APGD-CE, FAB and Square run.
    """
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        raise UserError(
            "the full suite must find the package pyautoattack: install it, or give --suite quick"
        ) from None
    with attack_mode(model), _flags() as flags:
        ensemble: Any = AutoAttack(model, norm=norm, eps=eps, seed=seed, device=images.x.device)
        with torch.no_grad():
            num_classes = model(images.x[:1]).shape[1]
        targets = min(ensemble.apgd_targeted.n_target_classes, num_classes - 1)
        ensemble.apgd_targeted.n_target_classes = ensemble.fab.n_target_classes = targets
        ensemble.square.n_queries = queries
        ensemble.attacks_to_run = ["apgd-ce", "apgd-t", "fab-t"] if num_classes >= 4 else ["apgd-ce", "fab"]
        white = ensemble.run_standard_evaluation(images.x, images.y, batch_size=512)[0]
        left = predict(model, white) == images.y
        broken = (predict(model, images.x) == images.y) & ~left
        square = images.x.clone()
        ensemble.attacks_to_run = ["square"]
        for rows in (left, broken):
            if rows.any():
                square[rows] = ensemble.run_standard_evaluation(images.x[rows], images.y[rows], batch_size=512)[0]
    return white, square, sorted(set(flags))


@contextmanager
def _flags() -> Iterator[list[str]]:
    """Collects what pyautoattack warns of, through its logger or as a warning."""
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
