"""TRADES: L = CE(F(x), y) + beta KL(F(x) || F(x1)) + lambda balance(x), with x1 = PGD_KL(F, x).

PGD_KL ascends that KL from x + 0.001 N(0, 1). Gradients flow through both sides of the loss's KL.

Source: Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019. With several
experts, TRADES-MoE. Their beta is 6 on CIFAR-10; the default was chosen on the digits.
"""

from torch import Tensor

from moe_kernels.ops import kl_divergence
from rter.methods.passes import Loss, Pass
from rter.methods.step import Step


def make_loss(step: Step, x: Tensor, y: Tensor) -> Loss:
    route = step.own_route(x)
    x1 = step.attack(step.model, loss="kl", random_start=False)(x, y, routing=route)
    routing = step.routing(x)

    def loss() -> dict[str, Tensor]:
        clean, adversarial = step.model(x, routing=route), step.model(x1, routing=route)
        kl = kl_divergence(clean, adversarial).mean()
        return {"clean": step.cross_entropy(clean, y), "kl": step.config.beta * kl, **routing()}

    return loss


PASSES = (Pass(make_loss),)
