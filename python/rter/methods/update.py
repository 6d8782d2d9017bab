"""One update of the parameters: the terms of a method, their gradient, a step of the optimiser."""

import torch
from torch import Tensor

from rter.data import Split
from rter.errors import NonFiniteError
from rter.methods import METHODS
from rter.methods.step import Step


def update(step: Step, optimizer: torch.optim.Optimizer, batch: Split) -> dict[str, Tensor]:
    """One step of the optimiser on the sum of the method's terms.

    Raises:
        NonFiniteError: if the loss or its gradient is no number; the weights are then as they were.
    """
    with step.arithmetic():
        terms = METHODS[step.config.method].terms(step, batch.x, batch.y)
    loss = torch.stack(list(terms.values())).sum()
    if not loss.isfinite():
        raise NonFiniteError("the loss", loss.item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}
