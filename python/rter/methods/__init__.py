"""Training methods, each a file with its formula and its passes. This list imports none of them, and so no torch."""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rter.train_attacks import SINGLE_STEPS, TRAIN_ATTACKS


@dataclass(frozen=True)
class Method:
    """A training method.

    Args:
        file: in this folder, without .py; the first line of its docstring is the formula, its PASSES do the training.
        attacks: which values of `--train-attack` it supports; only "pgd" if it has an attack of its own, or none.
        best_by: the accuracy that chooses the best weights, "sa" or "ra".
        defaults: settings for which the method has a default of its own.
        second_expert: whether it needs a second-ranked expert, and so at least two experts and a top-1 gate.
    """

    file: str
    attacks: tuple[str, ...] = TRAIN_ATTACKS
    best_by: str = "ra"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    second_expert: bool = False

    @property
    def passes(self) -> Any:
        """A tuple of `Pass`, run one after the other on each batch."""
        return pkgutil.resolve_name(f"rter.methods.{self.file}:PASSES")

    @property
    def summary(self) -> str:
        with Path(__file__).with_name(f"{self.file}.py").open(encoding="utf-8") as file:
            return file.readline().strip('"\n')


METHODS = {
    "standard": Method("standard", attacks=("pgd",), best_by="sa"),
    "pgd-at": Method("pgd_at"),
    "trades": Method("trades", defaults={"beta": 3.0}),
    "mart": Method("mart", defaults={"beta": 5.0}),
    "fast-at": Method(
        "fast_at",
        attacks=tuple(SINGLE_STEPS),
        defaults={"train_attack": "fgsm-rs", "weight_decay": 1.0, "explore": 1.0},
    ),
    "advmoe": Method("advmoe", attacks=("pgd",), defaults={"beta": 4.0}),
    "rt-er": Method("rt_er", second_expert=True),
    "dual": Method("dual", second_expert=True, defaults={"epochs": 40}),
    "jtdmoe": Method(
        "jtdmoe",
        second_expert=True,
        defaults={"dual_alpha": 0.9, "dual_mix": "probabilities", "beta": 1.0, "epochs": 30, "attack_steps": 5},
    ),
    "nine-experts": Method(
        "nine_experts",
        attacks=("pgd",),
        defaults={"num_experts": 9, "gate": "soft", "width": 8, "epochs": 36, "explore": 0.25, "attack_steps": 6},
    ),
}
FAITHFUL = {  # the settings of RT-ER's public code
    "gate": "hard",
    "second": "ranked",
    "beta": 6.0,
    "clean_weight": 0.0,
    "balance_weight": 0.0,
    "explore": 0.0,
}
