"""AdvMoE: experts, then router, by L = CE(F(x), y) + beta (KL(F(x) || F(x1)) + KL(r(x) || r(x1))) + lambda balance(x).

r(x) are the router's logits. x1 ascends both divergences at once, from x + 0.001 N(0, 1), in two steps of 5/8 eps. One
pass trains the experts alone, another the router alone, each with an x1 of its own. The sum of the two divergences
equals that of the joint distribution of class and expert, softmax(F_c + r_e) over all pairs, and is computed as such,
in log space.

Source: Zhang et al., Robust Mixture-of-Expert Training for Convolutional Neural Networks, ICCV 2023. Theirs routes the
channels of every layer and solves a bi-level problem; here whole images are routed and the two passes alternate.
Their beta is 6 on CIFAR-10; the default was chosen on the digits.
"""

from operator import attrgetter

from torch import Tensor

from moe_kernels import Routing
from moe_kernels.ops import kl_divergence
from rter.methods.passes import Loss, Pass
from rter.methods.step import Step
from rter.models.classifier import RobustClassifier, View


def make_loss(step: Step, x: Tensor, y: Tensor) -> Loss:
    own = step.own_route(x)

    def joint(model: RobustClassifier, x: Tensor) -> Tensor:
        route = model.route(x)
        return _pairs(model(x, routing=own or route), route)

    x1 = step.attack(View(step.model, joint), loss="kl", random_start=False, steps=2, alpha_ratio=5 / 8)(x, y)

    def loss() -> dict[str, Tensor]:
        route = step.model.route(x)
        clean = step.model(x, routing=own or route)
        kl = kl_divergence(_pairs(clean, route), joint(step.model, x1)).mean()
        return {"clean": step.cross_entropy(clean, y), "kl": step.config.beta * kl, **step.balance(x)}

    return loss


def _pairs(logits: Tensor, route: Routing) -> Tensor:
    """[B, C] and [B, E] -> [B, C * E]: the logits of every pair of a class and an expert."""
    return (logits[:, :, None] + route.logits[:, None, :]).flatten(1)


PASSES = (
    Pass(make_loss, part=attrgetter("moe.experts"), name="experts"),
    Pass(make_loss, part=attrgetter("moe.router"), name="router"),
)
