"""Prints the peak memory of whole processes: `python benchmarks/peak_memory.py [IMAGES STEPS]`.

Each contender runs in a process of its own; what the process held before it began is subtracted.
"""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from bench_attack import ALPHA, EPS, images, one_at_a_time, rt_er_step, rt_er_step_by_image
from peers import pgd
from torch import nn

from moe_kernels import PGD, ExpertResNet18, RobustMoE
from moe_kernels.testing.networks import ResNet18


def attack(lean: bool) -> Callable[[int, int], object]:
    def run(batch: int, steps: int) -> object:
        net, (x, y) = ResNet18().eval(), images(batch, 32)
        return PGD(net, EPS, ALPHA, steps)(x, y) if lean else pgd(net, x, y, EPS, ALPHA, steps)

    return run


def rt_er(recompute: str | None) -> Callable[[int, int], object]:
    def run(batch: int, steps: int) -> object:
        experts = ExpertResNet18(4, width=32, recompute=recompute or "none")
        router, (x, y) = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), images(batch, 32)
        if recompute is None:
            return rt_er_step_by_image(one_at_a_time(experts.eval(), router).eval(), x, y, steps)
        return rt_er_step(RobustMoE.from_experts(experts, router, gate="hard"), x, y, steps)

    return run


CONTENDERS = {
    "PGD on a ResNet-18: moe_kernels": attack(True),
    "PGD on a ResNet-18: as usually written": attack(False),
    "RT-ER step, 4 experts of width 32: recompute='activations'": rt_er("activations"),
    "RT-ER step, 4 experts of width 32: recompute='all'": rt_er("all"),
    "RT-ER step, 4 experts of width 32: one image at a time": rt_er(None),
}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    batch, steps = (int(a) for a in (sys.argv[1:] or ("128", "10")))
    print(f"| {batch} images, PGD-{steps} | peak MB |\n|---|---|")
    for name in CONTENDERS:
        command = [sys.executable, str(Path(__file__)), str(batch), str(steps), name]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(f"| {name} | {out.strip()} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        torch.manual_seed(0)
        before = peak()
        CONTENDERS[sys.argv[3]](int(sys.argv[1]), int(sys.argv[2]))
        print(f"{peak() - before:.0f}")
    else:
        main()
