"""The RT-ER step that the benchmarks time, on any device."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import PGD, RobustMoE, Routing, kl_divergence

EPS, ALPHA = 8 / 255, 2 / 255


class PartlyForced(nn.Module):
    """The last images under a forced route, those before them under their own, which an attack can change."""

    def __init__(self, moe: RobustMoE, forced: Routing) -> None:
        super().__init__()
        self.moe, self.forced = moe, forced

    def forward(self, x: Tensor) -> Tensor:
        own = self.moe.route(x[: len(x) - len(self.forced.experts)], top_k=1).select(0)
        return self.moe(x, routing=Routing.cat([own, self.forced]))


def rt_er_step(moe: RobustMoE, x: Tensor, y: Tensor, steps: int, **settings: Any) -> Tensor:
    """The loss, with gradients in .grad: both attacks (PGD with these settings) as one batch, all forwards as one."""
    second = moe.route(x, top_k=2).select(1)
    attack = PGD(PartlyForced(moe, second), EPS, ALPHA, steps, best_iterate=False, **settings)
    x1, x2 = attack(torch.cat([x, x]), torch.cat([y, y])).chunk(2)
    three = PartlyForced(moe, Routing.cat([second, second]))(torch.cat([x1, x2, x])).float()
    adversarial, second_adv, second_clean = three.chunk(3)
    loss = F.cross_entropy(adversarial, y) + 6 * kl_divergence(second_clean, second_adv).mean()
    loss.backward()
    return loss.detach()
