"""Prints the peak memory of whole processes: `python benchmarks/peak_memory.py [IMAGES STEPS]`.

Each contender runs in a process of its own; what the process held before it began, the networks included, is
subtracted. More steps need no more memory.
"""

import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bench_rt_er import ALPHA, EPS, images, make_router, rt_er_step
from peers import OneImageAtATime, pgd
from peers import rt_er_step as rt_er_step_by_image

from moe_kernels import PGD, ExpertResNet18, RobustMoE
from moe_kernels.testing.networks import ResNet18


def attack(lean: bool, batch: int, steps: int) -> Callable[[], object]:
    net, (x, y) = ResNet18().eval(), images(batch)
    return partial(PGD(net, EPS, ALPHA, steps), x, y) if lean else partial(pgd, net, x, y, EPS, ALPHA, steps)


def rt_er(recompute: str, batch: int, steps: int) -> Callable[[], object]:
    moe = RobustMoE.from_experts(ExpertResNet18(4, recompute=recompute), make_router(), gate="hard")
    return partial(rt_er_step, moe, *images(batch), steps)


def rt_er_by_image(batch: int, steps: int) -> Callable[[], object]:
    loop = OneImageAtATime([ResNet18().eval() for _ in range(4)], make_router())
    return partial(rt_er_step_by_image, loop, *images(batch), EPS, ALPHA, steps)


# title: {contender: what makes it}; the last is what the others should take a third of
CONTENDERS: dict[str, dict[str, Callable[[int, int], Callable[[], object]]]] = {
    "PGD on a ResNet-18": {"moe_kernels": partial(attack, True), "as usually written": partial(attack, False)},
    "RT-ER step, 4 x ResNet-18": {
        "moe_kernels, recompute='activations'": partial(rt_er, "activations"),
        "moe_kernels, recompute='all'": partial(rt_er, "all"),
        "one image at a time": rt_er_by_image,
    },
}


def peak() -> float:
    """MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(batch: int, steps: int, title: str, name: str) -> float:
    command = [sys.executable, str(Path(__file__)), str(batch), str(steps), title, name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(batch: int = 128, steps: int = 1) -> None:
    print(f"| {batch} images, PGD-{steps} | | peak MB | of the usual | target | |\n|---|---|---|---|---|---|")
    for title, contenders in CONTENDERS.items():
        megabytes = {name: measure(batch, steps, title, name) for name in contenders}
        *ours, usual = megabytes
        for name in ours:
            part = megabytes[name] / megabytes[usual]
            figures = f"{megabytes[name]:.0f} | {part:.2f} | <= 1/3 | {'met' if part <= 1 / 3 else 'missed'}"
            print(f"| {title} | {name} | {figures} |", flush=True)
        print(f"| {title} | {usual} | {megabytes[usual]:.0f} | 1 | | |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 5:
        torch.manual_seed(0)
        run = CONTENDERS[sys.argv[3]][sys.argv[4]](int(sys.argv[1]), int(sys.argv[2]))
        before = peak()
        run()
        print(peak() - before)
    else:
        main(*map(int, sys.argv[1:]))
