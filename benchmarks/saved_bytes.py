"""Prints what a forward saves for its backward, plainly and in attack_mode: `python benchmarks/saved_bytes.py`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
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


# name: (network, size of its images, target of attack_mode)
NETWORKS = {
    "ResNet-18": (ResNet18, 32, "<= 0.08"),
    "PreAct ResNet-18": (lambda: PreActResNet(((64, 2), (128, 2), (256, 2), (512, 2)), 64), 32, "1/35"),
    "WRN-28-10": (lambda: PreActResNet(((160, 4), (320, 4), (640, 4)), 16), 32, "1/35"),
    "ExpertResNet18, 1 expert": (lambda: Alone(ExpertResNet18(1, recompute="none")), 32, "<= 0.08"),
    "ViT-S/16": (ViT, 224, "1/4"),
}
TRAINING = {"none": "", "activations": "<= 2.4 fp32, 1.25 bf16", "all": ""}


Mode = Callable[[nn.Module], AbstractContextManager[None]]


def per_image(net: nn.Module, size: int, autocast: bool, mode: Mode = lambda _: nullcontext()) -> int:
    """Bytes that grow with the batch, in a second forward, in which attack_mode folds batch norms."""

    def of(batch: int) -> int:
        x = torch.rand(batch, 3, size, size).requires_grad_()
        with mode(net), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            net(x)
            return saved_bytes(lambda: net(x), apart_from=net)

    return of(2) - of(1)


def attacks() -> None:
    print("| MB saved per image | eager | attack_mode | ratio | eager, bf16 | attack_mode, bf16 | ratio | target |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (build, size, target) in NETWORKS.items():
        net, cells = build().eval(), []
        for autocast in (False, True):
            eager, lean = per_image(net, size, autocast), per_image(net, size, autocast, attack_mode)
            cells += [f"{eager / 1e6:.4g}", f"{lean / 1e6:.4g}", f"{eager / lean:.1f}"]
        print(f"| {name} | {' | '.join(cells)} | {target} |", flush=True)


def training() -> None:
    print("\n| ExpertResNet18 in training, MB per image | fp32 | bf16 | target |\n|---|---|---|---|")
    for recompute, target in TRAINING.items():
        net = Alone(ExpertResNet18(1, recompute=recompute))
        fp32, bf16 = (f"{per_image(net, 32, autocast) / 1e6:.4g}" for autocast in (False, True))
        print(f"| recompute={recompute!r} | {fp32} | {bf16} | {target} |", flush=True)


if __name__ == "__main__":
    attacks()
    training()
