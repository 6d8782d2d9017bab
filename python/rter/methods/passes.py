"""The passes of a training method over a batch, each with a loss and the part of the model that it trains."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rter.methods.step import Step

Loss = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Pass:
    """One step of the optimiser.

    Args:
        make_loss: `make_loss(step, x, y)` attacks the batch and gives the loss as a function of the weights: called, it
            returns the named terms whose sum is descended.
        part: the part of the model that is trained, and which alone gets a gradient.
        name: prefix of the names of the terms, if a method has several passes.
    """

    make_loss: Callable[[Step, Tensor, Tensor], Loss]
    part: Callable[[Any], nn.Module] = lambda model: model
    name: str = ""
