"""One update of the parameters: for each pass of a method, its loss, the gradient and a step of the optimiser."""

import torch
from torch import Tensor

from rter.data.split import Split
from rter.errors import NonFiniteError
from rter.methods import METHODS
from rter.methods.awp import kept_buffers, perturbed_weights
from rter.methods.passes import Loss, Pass
from rter.methods.step import Step
from rter.optimisation import finish_gradients


def update(step: Step, optimizer: torch.optim.Optimizer, batch: Split) -> dict[str, Tensor]:
    """Runs the method's passes one after the other; returns the loss, summed over them, and all terms, detached.

    Raises NonFiniteError if a loss or its gradient is not finite; the weights are then as they were before that pass.

    A parameter that no gradient reaches has .grad None and is left alone: neither momentum nor weight decay moves it.
    """
    for pass_ in METHODS[step.config.method].passes:
        with step.arithmetic():
            loss = pass_.make_loss(step, batch.x, batch.y)
        if step.awp_gamma:
            with kept_buffers(step.model):
                _gradient(pass_, loss, step)
            with perturbed_weights(pass_.part(step.model), step.awp_gamma):
                _gradient(pass_, loss, step)
        else:
            _gradient(pass_, loss, step)
        optimizer.step()
        optimizer.zero_grad()
    return {"loss": torch.stack(list(step.terms.values())).sum(), **step.terms}


def _gradient(pass_: Pass, loss: Loss, step: Step) -> None:
    """Puts the gradient of the terms' sum into .grad of the pass's parameters, and the terms into step.terms."""
    with step.arithmetic():
        terms = loss()
    prefix = f"{pass_.name}_" if pass_.name else ""
    step.terms.update({prefix + name: value.detach() for name, value in terms.items()})
    total = torch.stack(list(terms.values())).sum()
    if not total.isfinite():
        raise NonFiniteError("the loss", total.item())
    parameters = list(pass_.part(step.model).parameters())
    for parameter in parameters:
        parameter.grad = None
    part = step.share.part if step.share else 1.0
    (total * part).backward(inputs=parameters)
    finish_gradients(parameters, step.share, step.config.clip_norm)
