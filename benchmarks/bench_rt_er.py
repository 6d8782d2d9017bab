"""One RT-ER step for four ResNet-18 experts beside the loop over images that the papers' public code runs."""

from functools import partial

import pytest
import torch
from conftest import Contest
from peers import OneImageAtATime
from peers import rt_er_step as rt_er_step_by_image
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import PGD, ExpertResNet18, RobustMoE, Routing, kl_divergence
from moe_kernels.testing import Source

EPS, ALPHA = 8 / 255, 2 / 255


def rt_er_step(moe: RobustMoE, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Both attacks as one batch, the three forwards of the loss as another."""
    routing = moe.route(x, top_k=2)
    second = routing.select(1)
    both = Routing.cat([routing.select(0), second])
    attack = PGD(moe, EPS, ALPHA, steps, random_start=False, best_iterate=False)
    x1, x2 = attack(torch.cat([x, x]), torch.cat([y, y]), routing=both).chunk(2)
    three = moe(torch.cat([x1, x2, x]), routing=Routing.cat([both, second]))
    adversarial, second_adv, second_clean = three.chunk(3)
    loss = F.cross_entropy(adversarial, y) + 6 * kl_divergence(second_clean, second_adv).mean()
    loss.backward()
    return loss.detach()


def make_router() -> nn.Module:
    """Spreads the images, whose mean is normalised away, over four experts."""
    torch.manual_seed(0)
    pixels = 3 * 32 * 32
    return nn.Sequential(nn.Flatten(), nn.LayerNorm(pixels, elementwise_affine=False), nn.Linear(pixels, 4))


def images(batch: int) -> tuple[Tensor, Tensor]:
    s = Source(torch.float32)
    return s.rand(batch, 3, 32, 32), s.randint(10, batch).long()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["moe_kernels", "one image at a time, fp32"])
def test_step(contest: Contest, dtype: str, name: str) -> None:
    """Both attacks and the loss with its gradients."""
    batch, steps = 32, 10
    experts, router = ExpertResNet18(4).eval(), make_router()  # in eval mode, in which both ways agree
    x, y = images(batch)
    moe = RobustMoE.from_experts(experts, router, gate="hard")
    loop = OneImageAtATime.of(experts, router)
    if dtype == "fp32":
        torch.testing.assert_close(
            rt_er_step(moe, x[:4], y[:4], 1), rt_er_step_by_image(loop, x[:4], y[:4], EPS, ALPHA, 1), rtol=1e-2, atol=0
        )

    def ours() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            return rt_er_step(moe, x, y, steps)

    label = f"RT-ER step, 4 x ResNet-18, {batch} images, PGD-{steps} twice, {dtype}"
    theirs = partial(rt_er_step_by_image, loop, x, y, EPS, ALPHA, steps)
    contenders = {"moe_kernels": ours, "one image at a time, fp32": theirs}
    targets = {"one image at a time, fp32": ">= 3" if dtype == "fp32" else ">= 5"}
    contest(label, contenders, name, targets=targets, rounds=1)
