"""A PGD step and a PGD-10 on a dense ResNet-18, and one RT-ER step of four ResNet-18 experts, beside the usual code."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest
import torch
from conftest import Contest
from peers import OneImageAtATime, pgd, pgd_step
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import PGD, ExpertResNet18, RobustMoE, Routing, kl_divergence
from moe_kernels.testing import Source
from moe_kernels.testing.networks import ResNet18

EPS, ALPHA, STEPS = 8 / 255, 2 / 255, 10
WIDTH = 32


def images(batch: int, size: int) -> tuple[Tensor, Tensor]:
    s = Source(torch.float32)
    return s.rand(batch, 3, size, size), s.randint(10, batch).long()


class Alone(nn.Module):
    """One expert of a grouped network as a network of its own."""

    def __init__(self, experts: ExpertResNet18) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, torch.tensor([0, x.shape[0]], dtype=torch.int32))


def one_at_a_time(experts: ExpertResNet18, router: nn.Module) -> OneImageAtATime:
    """The same experts as separate networks, run image by image."""
    alone = []
    for e in range(experts.num_experts):
        single = ExpertResNet18(1, width=WIDTH)
        single.load_state_dict({name: t[e : e + 1] for name, t in experts.state_dict().items()})
        alone.append(Alone(single))
    return OneImageAtATime(alone, router)


@pytest.mark.parametrize("name", ["moe_kernels", "PGD as usually written"])
def test_pgd_10(contest: Contest, name: str) -> None:
    torch.manual_seed(0)
    model = Alone(ExpertResNet18(1, width=WIDTH)).eval()
    x, y = images(16, 32)
    attack = PGD(model, EPS, ALPHA, STEPS, random_start=False, best_iterate=False)
    contenders = {
        "moe_kernels": lambda: attack(x, y),
        "PGD as usually written": lambda: pgd(model, x, y, EPS, ALPHA, STEPS),
    }
    one_step = PGD(model, EPS, ALPHA, 1, random_start=False, best_iterate=False)(x, y)
    different = (one_step != pgd(model, x, y, EPS, ALPHA, 1)).float().mean()
    assert different < 0.01, f"one step differs in {different:.1%} of the pixels"  # later steps amplify rounding
    contest(f"PGD-10 on a ResNet-18 of width {WIDTH}, 16 images", contenders, name)


@pytest.mark.parametrize("name", ["moe_kernels", "eager, parameters trainable", "torchattacks", "foolbox"])
def test_attack_steps(contest: Contest, name: str) -> None:
    """PGD steps on a plain ResNet-18 as every library takes them, from the same start; ours folds from the 2nd on."""
    torch.manual_seed(0)
    model, (x, y) = ResNet18().eval(), images(8, 32)

    def ours(steps: int) -> Tensor:
        return PGD(model, EPS, ALPHA, steps, random_start=False, best_iterate=False)(x, y)

    def eager(steps: int) -> Tensor:
        x_adv = x
        for _ in range(steps):
            x_adv = x_adv.detach().clone().requires_grad_()
            model.zero_grad()
            F.cross_entropy(model(x_adv), y).backward()
            x_adv = pgd_step(x_adv.detach(), x_adv.grad, x, EPS, ALPHA)  # type: ignore[arg-type]
        return x_adv

    contenders: dict[str, Callable[[int], Tensor]] = {"moe_kernels": ours, "eager, parameters trainable": eager}
    with suppress(ImportError):
        import torchattacks

        contenders["torchattacks"] = lambda n: torchattacks.PGD(model, EPS, ALPHA, n, random_start=False)(x, y)
    with suppress(ImportError):
        import foolbox

        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
        linf = partial(foolbox.attacks.LinfPGD, abs_stepsize=ALPHA, random_start=False)
        contenders["foolbox"] = lambda n: linf(steps=n)(wrapped, x, y, epsilons=EPS)[1]
    if name not in contenders:
        pytest.skip(f"{name} is not installed")
    different = (contenders[name](1) != eager(1)).float().mean()
    assert different < 0.001, f"one step differs in {different:.1%} of the pixels"  # later steps amplify rounding
    target = [("eager, parameters trainable", 1.7), ("torchattacks", 1.6), ("foolbox", 1.6)]
    timed = {other: partial(attack, 4) for other, attack in contenders.items()}
    contest("4 PGD steps on a ResNet-18, 8 images", timed, name, target=target)


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


def rt_er_step_by_image(naive: OneImageAtATime, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Two attacks and three forwards, image by image."""
    second = naive.router(x).topk(2).indices[:, 1]

    def second_expert(x: Tensor) -> Tensor:
        return torch.cat([naive.experts[int(e)](image[None]) for e, image in zip(second, x, strict=True)])

    x1 = pgd(naive, x, y, EPS, ALPHA, steps)
    x2 = pgd(second_expert, x, y, EPS, ALPHA, steps)  # type: ignore[arg-type]
    log_p, log_q = second_expert(x).log_softmax(-1), second_expert(x2).log_softmax(-1)
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    loss = F.cross_entropy(naive(x1), y) + 6 * kl
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("name", ["moe_kernels", "one image at a time"])
def test_rt_er_step(contest: Contest, name: str) -> None:
    """Both attacks and the loss with its gradients, for four experts; experts in eval mode, so that both agree."""
    torch.manual_seed(0)
    experts = ExpertResNet18(4, width=WIDTH).eval()
    router = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    x, y = images(32, 32)
    ours = partial(rt_er_step, RobustMoE.from_experts(experts, router, gate="hard"), x, y)
    theirs = partial(rt_er_step_by_image, one_at_a_time(experts, router).eval(), x, y)
    torch.testing.assert_close(ours(1), theirs(1), rtol=1e-2, atol=0)
    label = f"RT-ER step, 4 x ResNet-18 of width {WIDTH}, 32 images, PGD-{STEPS} twice"
    contenders = {"moe_kernels": partial(ours, STEPS), "one image at a time": partial(theirs, STEPS)}
    contest(label, contenders, name, target=("one image at a time", 3))
