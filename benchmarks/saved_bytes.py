"""Prints what a forward saves for its backward, in eager torch and in attack_mode: `python benchmarks/saved_bytes.py`.

The targets of attack_mode are for fp32. In bf16 eager torch keeps half as much, while a ReLU in attack_mode still keeps
one bit, so the ratios are about half of those in fp32.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from ratios import verdict
from torch import Tensor, nn

from moe_kernels import ExpertResNet18
from moe_kernels.attacks import attack_mode
from moe_kernels.testing.networks import PreActResNet, ResNet18, ViT
from moe_kernels.testing.saved import saved_bytes


class Alone(nn.Module):
    """One expert of a grouped network as a network of its own."""

    def __init__(self, experts: ExpertResNet18) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, torch.tensor([0, x.shape[0]], dtype=torch.int32))


# name -> (network, size of its images, target: MB per image in attack_mode, or ratio of eager to that)
NETWORKS = {
    "ResNet-18": (ResNet18, 32, "<= 0.08 MB"),
    "PreAct ResNet-18": (lambda: PreActResNet(((64, 2), (128, 2), (256, 2), (512, 2)), 64), 32, ">= 35"),
    "WRN-28-10": (lambda: PreActResNet(((160, 4), (320, 4), (640, 4)), 16), 32, ">= 35"),
    "ExpertResNet18, 1 expert": (lambda: Alone(ExpertResNet18(1, recompute="none")), 32, "<= 0.08 MB"),
    "ViT-S/16": (ViT, 224, ">= 4"),
}
TRAINING = {"none": ("", ""), "activations": ("<= 2.4", "<= 1.25"), "all": ("", "")}  # MB in fp32 and in bf16

LARGE = 32
RECOMPUTING = partial(attack_mode, recompute="activations")

Mode = Callable[[nn.Module], AbstractContextManager[None]]


def per_image(net: nn.Module, size: int, autocast: bool, mode: Mode = lambda _: nullcontext()) -> int:
    """How many more bytes a batch keeps with one more image; for small images, a large batch."""

    def of(batch: int) -> int:
        x = torch.rand(batch, 3, size, size).requires_grad_()
        with mode(net), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return saved_bytes(lambda: net(x), apart_from=net)

    return of(LARGE + 1) - of(LARGE) if size == 32 else of(2) - of(1)


def judged(value: float, target: str) -> str:
    """Two cells: a target, such as "<= 0.08 MB", and whether the value meets it."""
    return f"{target} | {verdict(value, target.removesuffix(' MB'))}"


def attacks() -> None:
    head = "| MB saved per image | | eager | attack_mode, recomputing | ratio | target | |"
    print(head, "|---|---|---|---|---|---|---|", sep="\n")
    for name, (build, size, target) in NETWORKS.items():
        net = build().eval()
        for dtype in ("fp32", "bf16"):
            eager, lean = (per_image(net, size, dtype == "bf16", *mode) / 1e6 for mode in ((), (RECOMPUTING,)))
            cells = judged(lean if target.endswith("MB") else eager / lean, target)
            print(f"| {name} | {dtype} | {eager:.4g} | {lean:.4g} | {eager / lean:.1f} | {cells} |", flush=True)


def training() -> None:
    print(
        "\n| ExpertResNet18 in training, MB per image | fp32 | target | | bf16 | target | |", "|---" * 7 + "|", sep="\n"
    )
    for recompute, targets in TRAINING.items():
        net, cells = Alone(ExpertResNet18(1, recompute=recompute)), []
        for autocast, target in zip((False, True), targets, strict=True):
            saved = per_image(net, 32, autocast) / 1e6
            cells.append(f"{saved:.4g} | {judged(saved, target)}")
        print(f"| recompute={recompute!r} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    attacks()
    training()
