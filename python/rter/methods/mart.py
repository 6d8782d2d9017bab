"""MART: L = CE(F(x1), y) - log(1.0001 - max_{k != y} p1_k) + beta (1 - p_y) KL(F(x) || F(x1)) + lambda balance(x).

p = softmax F(x), p1 = softmax F(x1), x1 = PGD(F, x, y); all terms are means over the batch. The KL weighs more for
clean images that are not classified with confidence yet.

Source: Wang et al., Improving Adversarial Robustness Requires Revisiting Misclassified Examples, ICLR 2020.
"""

from torch import Tensor

from moe_kernels.ops import kl_divergence
from rter.methods.passes import Loss, Pass
from rter.methods.step import Step


def make_loss(step: Step, x: Tensor, y: Tensor) -> Loss:
    route = step.own_route(x)
    x1 = step.attack(step.model)(x, y, routing=route)
    routing = step.routing(x)

    def loss() -> dict[str, Tensor]:
        clean, adversarial = step.model(x, routing=route), step.model(x1, routing=route)
        strongest_other = adversarial.softmax(-1).scatter(1, y[:, None], 0).amax(1)
        p_y = clean.softmax(-1).gather(1, y[:, None])[:, 0]
        return {
            "adversarial": step.cross_entropy(adversarial, y),
            "margin": -(1.0001 - strongest_other).log().mean(),
            "kl": step.config.beta * (kl_divergence(clean, adversarial) * (1 - p_y)).mean(),
            **routing(),
        }

    return loss


PASSES = (Pass(make_loss),)
