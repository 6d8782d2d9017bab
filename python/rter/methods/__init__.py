"""Training methods. Each maps a model and a batch to the named terms whose sum is the loss."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rter.methods import pgd_at, rt_er, standard
from rter.methods.step import Step


@dataclass(frozen=True)
class Method:
    """`terms(step, x, y)` gives the terms of the loss; `best_by` is the accuracy that names the best weights."""

    terms: Callable[[Step, Tensor, Tensor], dict[str, Tensor]]
    best_by: str


METHODS = {
    "standard": Method(standard.terms, best_by="sa"),
    "pgd-at": Method(pgd_at.terms, best_by="ra"),
    "rt-er": Method(rt_er.terms, best_by="ra"),
}
