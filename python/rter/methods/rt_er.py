"""RT-ER: L = CE(F(x1), y) + beta KL(f_s(x) || f_s(x2)) + gamma CE(f_s(x), y) + lambda balance(x).

x1 = PGD(F, x, y) attacks the whole model and x2 = PGD(f_s, x, y) the expert s alone; KL is the mean over the batch, and
neither of its sides is detached. The paper has the first two terms, with the second-ranked expert of the clean x for s
(`--second ranked`). By default s is a random expert other than the first, since an attack can send an image to any of
them. A constant expert would minimise the KL; the third term prevents that, and the fourth the collapse of the router.

F(x) = sum_i a_i(x) f_i(x) over the chosen expert, where a is its softmax probability with `--gate softmax` (the
paper's), 1 with the softmax's gradient with `--gate straight_through`, and 1 without a gradient with `--gate hard`.
`--faithful` is the public code: the hard gate, and so a router that stays as initialised, the second-ranked expert, and
the first two terms.

Both attacks run as one batch of 2B rows, and the three forwards as one of 3B. An expert with BatchNorm therefore
takes its statistics over all rows that reach it, clean and adversarial together (docs/methods.md).

Source: Zhang et al., Optimizing Robustness and Accuracy in Mixture of Experts: A Dual-Model Approach, ICML 2025.
"""

import torch
from torch import Tensor

from moe_kernels import Routing
from moe_kernels.ops import kl_divergence
from rter.methods.passes import Loss, Pass
from rter.methods.step import Step, partly_forced


def make_loss(step: Step, x: Tensor, y: Tensor) -> Loss:
    model, config = step.model, step.config
    own = step.own_route(x)
    second = step.ranked_route(x, range(1, model.num_experts if config.second == "random" else 2), "second")
    both = partly_forced(model, own, second)
    x1, x2 = step.attack(both)(torch.cat([x, x]), torch.cat([y, y])).chunk(2)
    routing = step.routing(x)
    three = partly_forced(model, own, Routing.cat([second, second]))

    def loss() -> dict[str, Tensor]:
        moe_adv, second_adv, second_clean = three(torch.cat([x1, x2, x])).chunk(3)
        return {
            "adversarial": step.cross_entropy(moe_adv, y),
            "kl": config.beta * kl_divergence(second_clean, second_adv).mean(),
            "clean_second": config.clean_weight * step.cross_entropy(second_clean, y),
            **routing(),
        }

    return loss


PASSES = (Pass(make_loss),)
