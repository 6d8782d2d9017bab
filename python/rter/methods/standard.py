"""Standard training: L = CE(F(x), y) + lambda balance(x)."""

from torch import Tensor
from torch.nn import functional as F

from rter.methods.method import Loss, Method, Pass
from rter.methods.step import Step


def terms(step: Step, x: Tensor, y: Tensor) -> Loss:
    route = step.own_route(x)
    return lambda: {"clean": F.cross_entropy(step.model(x, routing=route), y), **step.balance(x)}


METHOD = Method(__doc__, (Pass(terms),), best_by="sa")
