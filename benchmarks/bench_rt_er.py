"""One RT-ER step for four ResNet-18 experts against the loop over images in the paper's public code."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import MAX_GRADIENT_ERROR, Contest, direction, first_is_core, second_step
from peers import OneImageAtATime
from peers import rt_er_step as rt_er_step_by_image
from rt_er import ALPHA, EPS, rt_er_step
from torch import Tensor, nn

from moe_kernels import ExpertBatchNorm2d, ExpertResNet18, RobustMoE, Routing
from moe_kernels.testing import Source


def make_router() -> nn.Module:
    """A router that spreads the images over four experts, since their mean is normalised away."""
    torch.manual_seed(0)
    pixels = 3 * 32 * 32
    return nn.Sequential(nn.Flatten(), nn.LayerNorm(pixels, elementwise_affine=False), nn.Linear(pixels, 4))


def make_experts() -> ExpertResNet18:
    """Experts in eval mode, in which both contenders compute the same, with statistics of order 1."""
    experts = ExpertResNet18(4).eval()
    for norm in experts.modules():
        if isinstance(norm, ExpertBatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.2, 0.2)
    return experts


def images(batch: int) -> tuple[Tensor, Tensor]:
    s = Source(torch.float32)
    return s.rand(batch, 3, 32, 32), s.randint(10, batch).long()


def check(moe: RobustMoE, loop: OneImageAtATime, step: Callable[..., Tensor], x: Tensor, y: Tensor, bf16: bool) -> None:
    """Checks the attacks' second gradient against fp64, and the parameters' gradients against the loop."""
    bound = MAX_GRADIENT_ERROR[torch.bfloat16 if bf16 else torch.float32]
    x_adv, found = second_step(moe, partial(step, moe, x, y, 2))
    routes = moe.route(x_adv[: len(x)].float(), top_k=1), moe.route(x, top_k=2).select(1)
    chosen, experts = Routing.cat(routes).experts.flatten().tolist(), copy.deepcopy(loop.experts).double()

    def exact(x: Tensor) -> Tensor:
        return torch.cat([experts[e](image[None]) for e, image in zip(chosen, x, strict=True)])

    error = (found - direction(exact, x_adv, torch.cat([y, y]))).norm()
    assert error <= bound, f"the second gradient is wrong by {error:.1e}"
    rt_er_step_by_image(loop, x, y, EPS, ALPHA, 2)
    for name, parameter in moe.experts.named_parameters():
        alone = [expert.get_parameter(name) for expert in loop.experts]
        theirs = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in alone])
        error = (parameter.grad - theirs).norm() / theirs.norm()
        assert error <= bound, f"the gradient of {name} is wrong by {error:.1e}"


@pytest.mark.parametrize("dtype", first_is_core(["fp32", "bf16"]))
@pytest.mark.parametrize("name", ["moe_kernels", "one image at a time, fp32"])
def test_step(contest: Contest, dtype: str, name: str) -> None:
    """Both attacks and the loss with its gradients."""
    batch, steps = 32, 10
    router, experts = make_router(), make_experts()
    x, y = images(batch)
    moe = RobustMoE.from_experts(experts, router, gate="hard")
    loop = OneImageAtATime.of(experts, router)

    def step(*arguments: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            return rt_er_step(*arguments, random_start=False)

    check(moe, loop, step, x[:4], y[:4], dtype == "bf16")
    label = f"RT-ER step, 4 x ResNet-18, {batch} images, PGD-{steps} twice, {dtype}"
    theirs = partial(rt_er_step_by_image, loop, x, y, EPS, ALPHA, steps)
    contenders = {"moe_kernels": partial(step, moe, x, y, steps), "one image at a time, fp32": theirs}
    targets = {"one image at a time, fp32": ">= 3.5" if dtype == "fp32" else ">= 5"}
    contest(label, contenders, name, targets=targets, rounds=1)
