"""One update of the parameters: for each pass of a method its terms, their gradient, a step of the optimiser."""

import torch
from torch import Tensor, nn

from rter.data import Split
from rter.errors import UserError
from rter.methods import METHODS
from rter.methods.awp import kept_buffers, perturbed_weights
from rter.methods.method import Loss
from rter.methods.step import Step


def update(step: Step, optimizer: torch.optim.Optimizer, batch: Split) -> dict[str, Tensor]:
    """Runs the method's passes one after the other; returns the loss, summed over them, and all terms, detached.

    A parameter that no gradient reaches has .grad None and stands still: neither momentum nor weight decay moves it.
    """
    record: dict[str, Tensor] = {}
    for run in METHODS[step.config.method].passes:
        terms, part = run.terms(step, batch.x, batch.y), run.part(step.model)
        if step.awp_gamma:
            with kept_buffers(step.model):
                _gradient(terms, part, step.index)
            with perturbed_weights(part, step.awp_gamma):
                values = _gradient(terms, part, step.index)
        else:
            values = _gradient(terms, part, step.index)
        optimizer.step()
        optimizer.zero_grad()
        prefix = f"{run.name}_" if run.name else ""
        record |= {prefix + name: value for name, value in values.items()}
    return {"loss": torch.stack(list(record.values())).sum(), **record}


def _gradient(terms: Loss, part: nn.Module, index: int) -> dict[str, Tensor]:
    """Puts the gradient of the terms' sum into .grad of the part's parameters; returns the terms, detached."""
    values = terms()
    loss = torch.stack(list(values.values())).sum()
    if not loss.isfinite():
        raise UserError(f"the loss became {loss.item()} at step {index}: a lower lr may help")
    for parameter in part.parameters():
        parameter.grad = None
    loss.backward(inputs=list(part.parameters()))
    return {name: value.detach() for name, value in values.items()}
