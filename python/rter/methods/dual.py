"""Dual model: F_D = (1 - alpha) F_S + alpha F_R on logits, with F_S by standard training and F_R by RT-ER, at once.

The two share no parameter and are trained independently; alpha (--dual-alpha) can be changed afterwards, and the report
measures F_D for alpha from 0 to 1. The paper's alpha is 0.7; on the digits F_S's logits are so much larger that F_R
only has an influence if alpha is near 1.

Source: Zhang et al., Optimizing Robustness and Accuracy in Mixture of Experts: A Dual-Model Approach, ICML 2025.
"""

from dataclasses import replace
from operator import attrgetter

from torch import Tensor

from rter.methods import rt_er, standard
from rter.methods.passes import Loss, Pass
from rter.methods.step import Step


def _standard(step: Step, x: Tensor, y: Tensor) -> Loss:
    return standard.make_loss(replace(step, model=step.dual.standard), x, y)


def _robust(step: Step, x: Tensor, y: Tensor) -> Loss:
    return rt_er.make_loss(replace(step, model=step.dual.robust), x, y)


PASSES = (
    Pass(_standard, part=attrgetter("standard"), name="standard"),
    Pass(_robust, part=attrgetter("robust"), name="robust"),
)
