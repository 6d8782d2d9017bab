"""JTDMoE: F_R by CE(F_R(x1), y) + beta sum_e KL(f_e(x) || f_e(x_e)), F_S by CE(F_D(x), y), both + lambda balance(x).

x1 = PGD(F_R, x, y), and x_e = PGD(f_e, x, y) attacks expert e of F_R alone; e runs over all experts, and each KL is the
mean over the batch. F_D = (1 - alpha) F_S + alpha F_R on clean images; F_R is frozen while F_S is trained. The paper
has no balance loss (--balance-weight 0).

F_D mixes probabilities (--dual-mix), since the paper's theory assumes outputs of at most 1: whatever F_S predicts, F_D
predicts what F_R does if F_R's margin is above (1 - alpha) / alpha. The public code mixes logits, which are unbounded:
trained through F_D on clean images, those of F_S grow until F_R has no influence, whatever alpha is (docs/methods.md).
The paper's alpha is 0.7.

All attacks run as one batch of (1 + E) B rows and all forwards of F_R as one of (1 + 2E) B.

Source: Zhang et al., Optimizing Robustness and Accuracy in Mixture of Experts: A Dual-Model Approach, ICML 2025,
algorithm 1.
"""

from dataclasses import replace
from operator import attrgetter

import torch
from torch import Tensor

from moe_kernels import Routing, attack_mode
from moe_kernels.ops import kl_divergence
from rter.methods.passes import Loss, Pass
from rter.methods.step import Step, partly_forced


def _robust(step: Step, x: Tensor, y: Tensor) -> Loss:
    step = replace(step, model=step.dual.robust)
    model, config, E = step.model, step.config, step.model.num_experts
    own, route = step.own_route(x), step.clean_route(x)
    each = Routing.cat([route.fixed(e) for e in range(E)])
    attacked = step.attack(partly_forced(model, own, each))(x.repeat(1 + E, 1, 1, 1), y.repeat(1 + E))
    routing = step.routing(x)
    all_forwards = partly_forced(model, own, Routing.cat([each, each]))

    def loss() -> dict[str, Tensor]:
        logits = all_forwards(torch.cat([attacked, x.repeat(E, 1, 1, 1)]))
        moe_adv, expert_adv, expert_clean = logits.split([len(x), E * len(x), E * len(x)])
        return {
            "adversarial": step.cross_entropy(moe_adv, y),
            "kl": config.beta / len(x) * kl_divergence(expert_clean, expert_adv).sum(),
            **routing(),
        }

    return loss


def _standard(step: Step, x: Tensor, y: Tensor) -> Loss:
    dual = step.dual
    step = replace(step, model=dual.standard)
    own = step.own_route(x)
    with attack_mode(dual.robust), torch.no_grad():
        robust = dual.robust(x)
    return lambda: {"clean": step.cross_entropy(dual.mix(dual.standard(x, routing=own), robust), y), **step.balance(x)}


PASSES = (
    Pass(_robust, part=attrgetter("robust"), name="robust"),
    Pass(_standard, part=attrgetter("standard"), name="standard"),
)
