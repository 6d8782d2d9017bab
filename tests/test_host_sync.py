"""Between router and combine, and from step to step of an attack, the host never waits for the device."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import PGD, ExpertResNet18, RobustMoE, attack_mode, pgd_step_
from moe_kernels.testing.host_sync import HostSyncs

META = torch.device("meta")  # without values: reading one raises


def image_model(device: torch.device) -> RobustMoE:
    router = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2, device=device))
    return RobustMoE.from_experts(ExpertResNet18(2, width=2, device=device), router)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.unique(x),
        lambda x: x.repeat_interleave(torch.tensor([1, 2, 1])),
        lambda x: x.to("meta"),
    ],
)
def test_waits_are_detected(wait: Callable[[Tensor], object]) -> None:
    with HostSyncs() as syncs:
        wait(torch.randn(3))
    assert syncs.calls


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_the_layer_never_waits(activation: str) -> None:
    """Forward and backward, from the router's logits to the gradients of all parameters."""
    moe = RobustMoE(8, 16, 4, 2, activation=activation, device=META)
    x = torch.empty(6, 8, device=META, requires_grad=True)
    with HostSyncs() as syncs:
        routing = moe.route(x)
        loss = moe(x, routing=routing).sum() + routing.balance_loss() + routing.z_loss()
        loss.backward()
    assert syncs.calls == []
    assert all(p.grad is not None and p.grad.device == META for p in (x, *moe.parameters()))


def test_a_training_step_of_grouped_resnets_never_waits() -> None:
    model = image_model(META)
    x, y = torch.empty(5, 3, 8, 8, device=META), torch.empty(5, dtype=torch.long, device=META)
    with HostSyncs() as syncs:
        F.cross_entropy(model(x), y).backward()
    assert syncs.calls == []


def test_an_attack_step_never_waits() -> None:
    model = image_model(META)
    x, y = torch.empty(5, 3, 8, 8, device=META), torch.empty(5, dtype=torch.long, device=META)
    with attack_mode(model), HostSyncs() as syncs:
        x_adv = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), [x_adv])
        pgd_step_(x_adv.detach(), grad, x, 8 / 255, 2 / 255)
    assert syncs.calls == []


@pytest.mark.parametrize("loss", ["ce", "kl", "margin"])
def test_pgd_waits_as_often_for_any_number_of_steps(loss: str) -> None:
    model = image_model(torch.device("cpu"))
    x, y = torch.rand(5, 3, 8, 8), torch.randint(10, (5,))
    counts = []
    for steps in (1, 3):
        with HostSyncs() as syncs:
            PGD(model, steps=steps, loss=loss, seed=0)(x, y)
        counts.append(len(syncs.calls))
    assert counts[0] == counts[1] <= 10
