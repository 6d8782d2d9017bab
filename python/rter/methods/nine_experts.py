"""Nine experts: L = sum_e CE(f_e(x_e), y), then L = CE(F(x), y) + CE(F(x1), y), with F = sum_e softmax(r)_e f_e.

Phase 1, the first fraction --explore of the epochs, trains the experts independently: expert 0 on x, four on FGSM
examples and four on PGD examples of their own. As they share no parameter, the sum of their losses trains each as if
alone, and all nine run as one batch of 9B rows. Phase 2 trains the gate and all experts, with x1 = PGD(F, x, y).

For every batch are drawn: each FGSM expert's radius from {1, ..., 9} / 9 of --fgsm-reach * eps, and one number of
steps, of --alpha-ratio * eps each, for all PGD experts from {10, 20, 30, 40, 50} * --pgd-scale. The paper's radii 0.01
to 0.09 are a reach of 2.87 at eps 8/255, its steps a scale of 1.

The paper leaves open, and here is chosen: FGSM's start (the image itself), PGD's eps and step (the run's), one draw of
steps for four experts (each sees the same distribution, and they stay one batch), the mix of phase 2 (half clean, half
perturbed, with equal weights), the gate (the run's router), and the optimiser (the run's, through both phases).

Source: Defending against adversarial attacks using mixture of experts, arXiv 2512.20821.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kernels import Routing
from rter.methods.passes import Loss, Pass
from rter.methods.step import Step

FGSM_EXPERTS, PGD_EXPERTS = range(1, 5), range(5, 9)


def make_loss(step: Step, x: Tensor, y: Tensor) -> Loss:
    return _apart(step, x, y) if step.exploring else _together(step, x, y)


def _apart(step: Step, x: Tensor, y: Tensor) -> Loss:
    model, config, B = step.model, step.config, len(x)
    route = model.route(x)
    draw = torch.Generator().manual_seed(config.seed_for("nine experts", step.index))
    ninths = torch.randint(1, 10, (len(FGSM_EXPERTS),), generator=draw).to(x)
    steps = 10 * int(torch.randint(1, 6, (), generator=draw))

    def alone(experts: Sequence[int]) -> Routing:
        return Routing.cat([route.fixed(e) for e in experts])

    x4, y4 = x.repeat(4, 1, 1, 1), y.repeat(4)
    radii = config.fgsm_reach * config.eps / 9 * ninths.repeat_interleave(B)
    fgsm = step.attack(model, eps=radii, steps=1, alpha_ratio=1.0, random_start=False)
    pgd = step.attack(model, steps=max(1, round(steps * config.pgd_scale)))
    own = torch.cat([x, fgsm(x4, y4, routing=alone(FGSM_EXPERTS)), pgd(x4, y4, routing=alone(PGD_EXPERTS))])

    def loss() -> dict[str, Tensor]:
        logits = model(own, routing=alone(range(9)))
        each = torch.stack([step.cross_entropy(part, y) for part in logits.chunk(9)])
        return {"benign": each[0], "fgsm": each[1:5].sum(), "pgd": each[5:].sum()}

    return loss


def _together(step: Step, x: Tensor, y: Tensor) -> Loss:
    x1 = step.attack(step.model)(x, y)

    def loss() -> dict[str, Tensor]:
        return {"clean": step.cross_entropy(step.model(x), y), "adversarial": step.cross_entropy(step.model(x1), y)}

    return loss


PASSES = (Pass(make_loss),)
