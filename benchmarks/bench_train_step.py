"""One step of single-step adversarial training, as `rter train --train-attack fgsm-rs`, beside plain loops."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import MAX_GRADIENT_ERROR, Contest, first_is_core
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import PGD, ExpertResNet18, RobustMoE
from moe_kernels.nn.recompute import RECOMPUTE
from moe_kernels.testing import Source
from moe_kernels.testing.networks import ResNet18

EPS = 8 / 255
CASES = [(16, 128, 1), (16, 128, 4), (64, 32, 1), (64, 32, 4)]  # width, images, experts


class Loop(nn.Module):
    """Each expert on the images that the router sends to it."""

    def __init__(self, experts: list[nn.Module], router: nn.Module) -> None:
        super().__init__()
        self.experts, self.router = nn.ModuleList(experts), router

    def forward(self, x: Tensor) -> Tensor:
        if len(self.experts) == 1:
            return self.experts[0](x)  # type: ignore[no-any-return]
        chosen = self.router(x).argmax(1)
        rows = [(chosen == e).nonzero()[:, 0] for e in range(len(self.experts))]
        logits = torch.cat([expert(x[i]) for expert, i in zip(self.experts, rows, strict=True)])
        return logits[torch.cat(rows).argsort()]


def fgsm(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """In eval mode, as our attacks."""
    model.eval()
    start = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1).requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(start), y), start)
    model.train()
    return (x + (start.detach() + 1.25 * EPS * grad.sign() - x).clamp(-EPS, EPS)).clamp(0, 1)


def make_step(model: nn.Module, attack: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, 0.9, weight_decay=5e-4)

    def step() -> None:
        loss = F.cross_entropy(model(attack(x, y)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def check(ours: nn.Module, loop: Loop, x: Tensor, y: Tensor) -> None:
    """Checks the gradients of images and weights, in eval mode, in which rounding does not reach the statistics."""
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for model, leaf in zip((ours, loop), leaves, strict=True):
        model.eval()
        F.cross_entropy(model(leaf), y).backward()
    found, expected = (leaf.grad for leaf in leaves)
    assert (found - expected).norm() <= MAX_GRADIENT_ERROR[torch.float32] * expected.norm()
    for name, parameter in ours.experts.named_parameters():  # type: ignore[union-attr]
        alone = [expert.get_parameter(name) for expert in loop.experts]
        theirs = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in alone])
        error = (parameter.grad - theirs).norm() / theirs.norm()
        assert error <= MAX_GRADIENT_ERROR[torch.float32], f"the gradient of {name} is wrong by {error:.1e}"
    ours.train(), loop.train()


def named(experts: int) -> str:
    return "a dense one" if experts == 1 else f"a mixture of {experts}"


@pytest.mark.parametrize("case", first_is_core(CASES), ids=str)
@pytest.mark.parametrize("name", ["moe_kernels", "eager", "eager, channels-last"])
def test_step(contest: Contest, case: tuple[int, int, int], name: str) -> None:
    """The attack, the loss, its gradient and the optimiser; training mode, fp32."""
    torch.manual_seed(0)
    width, batch, experts = case
    s = Source(torch.float32)
    x, y = s.rand(batch, 3, 32, 32), s.randint(10, batch).long()
    router = nn.Sequential(nn.Flatten(), nn.LayerNorm(3072, elementwise_affine=False), nn.Linear(3072, experts))
    loop = Loop([ResNet18(width=width) for _ in range(experts)], router)
    grouped = ExpertResNet18.from_state_dicts([expert.state_dict() for expert in loop.experts])
    grouped.recompute = "none"
    ours = RobustMoE.from_experts(grouped, router, gate="hard")
    check(ours, loop, x[:16], y[:16])
    attack = PGD(ours, EPS, 1.25 * EPS, 1, best_iterate=False)
    contenders: dict[str, Callable[[], Any]] = {"moe_kernels": make_step(ours, attack, x, y)}
    for kind, layout in {"eager": torch.contiguous_format, "eager, channels-last": torch.channels_last}.items():
        plain = Loop([ResNet18(width=width) for _ in range(experts)], router).to(memory_format=layout)
        contenders[kind] = make_step(plain, partial(fgsm, plain), x.contiguous(memory_format=layout), y)
    label = f"training step of single-step AT, {named(experts)} of ResNet-18 of width {width}, {batch} images"
    contest(label, contenders, name, targets={"eager": ">= 1.5", "eager, channels-last": ">= 1.5"})


def gradients(experts: ExpertResNet18, x: Tensor, offsets: Tensor, y: Tensor) -> list[Tensor | None]:
    experts.zero_grad()
    F.cross_entropy(experts(x, offsets), y).backward()
    return [parameter.grad for parameter in experts.parameters()]


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("name", ["moe_kernels", *RECOMPUTE[1:]])
def test_recompute(contest: Contest, experts: int, name: str) -> None:
    """What it takes to keep less: the weights' gradients with each `recompute`, beside "none"."""
    s = Source(torch.float32)
    x, y = s.rand(16, 3, 32, 32), s.randint(10, 16).long()
    offsets = torch.arange(0, 17, 16 // experts, dtype=torch.int32)
    networks = {kind: ExpertResNet18(experts, recompute=kind) for kind in RECOMPUTE}
    for network in networks.values():
        network.load_state_dict(networks["none"].state_dict())
    networks["moe_kernels"] = networks.pop("none")
    contenders = {kind: partial(gradients, network, x, offsets, y) for kind, network in networks.items()}
    torch.testing.assert_close(contenders[name](), contenders["moe_kernels"](), rtol=0, atol=0)
    contest(f'gradients of {named(experts)} of ResNet-18, 16 images, beside recompute="none"', contenders, name)
