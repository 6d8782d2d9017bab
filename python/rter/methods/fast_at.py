"""Fast adversarial training: L = CE(F(x1), y) + lambda balance(x), with x1 = FGSM of 1.25 eps from a random start.

The start is uniform in the ball and the step is projected back into it. The measurements on held-out images keep the
run's PGD, so that a collapse to robustness against one step alone is seen, and best.safetensors is from before it. The
defaults, a strong weight decay and exploring to the end, were the most robust of about ten tried on the digits.

Source: Wong, Rice and Kolter, Fast is better than free, ICLR 2020.
"""

from torch import Tensor
from torch.nn import functional as F

from rter.methods.passes import Loss, Pass
from rter.methods.step import Step


def terms(step: Step, x: Tensor, y: Tensor) -> Loss:
    route = step.own_route(x)
    x1 = step.attack(step.model, steps=1, alpha_ratio=1.25)(x, y, routing=route)
    return lambda: {"adversarial": F.cross_entropy(step.model(x1, routing=route), y), **step.balance(x)}


PASSES = (Pass(terms),)
