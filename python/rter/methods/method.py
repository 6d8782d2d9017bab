"""What a training method is: passes over a batch, each with a loss and the part of the model that it trains."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from rter.methods.step import Step

Loss = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Pass:
    """One step of the optimiser.

    Args:
        terms: `terms(step, x, y)` attacks the batch and gives the loss as a function of the weights: called, it returns
            the named terms whose sum is descended.
        part: the part of the model that is trained, and which alone gets a gradient.
        name: put before the names of the terms, where a method has several passes.
    """

    terms: Callable[[Step, Tensor, Tensor], Loss]
    part: Callable[[Any], nn.Module] = lambda model: model
    name: str = ""


@dataclass(frozen=True)
class Method:
    """A training method.

    Args:
        doc: its file's docstring, whose first line is the formula.
        passes: run one after the other on each batch.
        best_by: the accuracy that names the best weights, "sa" or "ra".
        defaults: settings for which the method has a default of its own.
        second_expert: whether it needs a second-ranked expert, so two experts or more and a top-1 gate.
    """

    doc: str | None
    passes: tuple[Pass, ...]
    best_by: str = "ra"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    second_expert: bool = False

    @property
    def summary(self) -> str:
        return (self.doc or "").splitlines()[0]
