"""The rows of a sweep's tables, each with the settings that define it."""

from collections.abc import Mapping
from typing import Any

from rter.methods import METHODS

Rows = Mapping[str, dict[str, Any]]

ROWS: Rows = {
    "rt-er": {"method": "rt-er"},
    **{name: {"method": name} for name in METHODS},
    "nine-experts": {"method": "nine-experts", "num_experts": 9, "gate": "soft"},
    "dense pgd-at": {"method": "pgd-at", "num_experts": 1},
}
ABLATION: Rows = {
    "rt-er": {"method": "rt-er"},
    "without clean CE": {"method": "rt-er", "clean_weight": 0.0},
    "without KL": {"method": "rt-er", "beta": 0.0},
    "without balance": {"method": "rt-er", "balance_weight": 0.0},
    "without exploring": {"method": "rt-er", "explore": 0.0},
    "ranked second expert": {"method": "rt-er", "second": "ranked"},
    "softmax gate": {"method": "rt-er", "gate": "softmax"},
}
