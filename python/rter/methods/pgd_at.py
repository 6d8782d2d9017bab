"""PGD adversarial training: L = CE(F(x1), y) + lambda balance(x), with x1 = PGD(F, x, y).

Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018. With several
experts, AT-MoE.
"""

from torch import Tensor

from rter.methods.passes import Loss, Pass
from rter.methods.step import Step


def make_loss(step: Step, x: Tensor, y: Tensor) -> Loss:
    route = step.own_route(x)
    x1 = step.attack(step.model)(x, y, routing=route)
    routing = step.routing(x)
    return lambda: {"adversarial": step.cross_entropy(step.model(x1, routing=route), y), **routing()}


PASSES = (Pass(make_loss),)
