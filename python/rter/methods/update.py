"""One update of the parameters: for each pass of a method its terms, their gradient, a step of the optimiser."""

import torch
from torch import Tensor, nn

from rter.data import Split
from rter.errors import NonFiniteError
from rter.methods import METHODS
from rter.methods.awp import kept_buffers, perturbed_weights
from rter.methods.method import Loss
from rter.methods.step import Step
from rter.optimisation import finish_gradients


def update(step: Step, optimizer: torch.optim.Optimizer, batch: Split) -> dict[str, Tensor]:
    """Runs the method's passes one after the other; returns the loss, summed over them, and all terms, detached.

    Raises NonFiniteError if a loss or its gradient is no number; the weights are then as they were before that pass.

    A parameter that no gradient reaches has .grad None and stands still: neither momentum nor weight decay moves it.
    """
    record: dict[str, Tensor] = {}
    for run in METHODS[step.config.method].passes:
        part = run.part(step.model)
        with step.arithmetic():
            terms = run.terms(step, batch.x, batch.y)
        if step.awp_gamma:
            with kept_buffers(step.model):
                _gradient(terms, part, step)
            with perturbed_weights(part, step.awp_gamma):
                values = _gradient(terms, part, step)
        else:
            values = _gradient(terms, part, step)
        optimizer.step()
        optimizer.zero_grad()
        prefix = f"{run.name}_" if run.name else ""
        record |= {prefix + name: value for name, value in values.items()}
    return {"loss": torch.stack(list(record.values())).sum(), **record}


def _gradient(terms: Loss, part: nn.Module, step: Step) -> dict[str, Tensor]:
    """Puts the gradient of the terms' sum into .grad of the part's parameters; returns the terms, detached."""
    with step.arithmetic():
        values = terms()
    loss = torch.stack(list(values.values())).sum()
    if not loss.isfinite():
        raise NonFiniteError("the loss", loss.item())
    parameters = list(part.parameters())
    for parameter in parameters:
        parameter.grad = None
    loss.backward(inputs=parameters)
    finish_gradients(parameters, step.share, step.config.clip_norm)
    return {name: value.detach() for name, value in values.items()}
