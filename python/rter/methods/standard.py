"""Standard training: L = CE(F(x), y) + lambda balance(x)."""

from torch import Tensor

from rter.methods.passes import Loss, Pass
from rter.methods.step import Step


def make_loss(step: Step, x: Tensor, y: Tensor) -> Loss:
    route = step.own_route(x)
    return lambda: {"clean": step.cross_entropy(step.model(x, routing=route), y), **step.balance(x)}


PASSES = (Pass(make_loss),)
