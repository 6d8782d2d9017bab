"""Prints the peak memory of whole processes, on Linux: `python benchmarks/peak_memory.py [IMAGES STEPS]`.

Each contender runs in a process of its own; what the process held before the start, networks included, is subtracted.
By default glibc's allocator keeps freed memory for later; told to return every block of 64 KiB, it shows what a
contender needs. The peak with the allocator's defaults is in the last column. An RT-ER step has its peak in the loss,
after the attacks, so attacks of two steps are enough.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bench_rt_er import images, make_router
from peers import OneImageAtATime, pgd
from peers import rt_er_step as rt_er_step_by_image
from rt_er import ALPHA, EPS, rt_er_step

from moe_kernels import PGD, ExpertResNet18, RobustMoE
from moe_kernels.testing.networks import ResNet18

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def attack(lean: bool, batch: int, steps: int) -> Callable[[], object]:
    net, (x, y) = ResNet18().eval(), images(batch)
    return partial(PGD(net, EPS, ALPHA, steps), x, y) if lean else partial(pgd, net, x, y, EPS, ALPHA, steps)


def rt_er(recompute: str, batch: int, steps: int) -> Callable[[], object]:
    moe = RobustMoE.from_experts(ExpertResNet18(4, recompute=recompute), make_router(), gate="hard")
    return partial(rt_er_step, moe, *images(batch), steps, random_start=False)


def rt_er_by_image(batch: int, steps: int) -> Callable[[], object]:
    loop = OneImageAtATime([ResNet18().eval() for _ in range(4)], make_router())
    return partial(rt_er_step_by_image, loop, *images(batch), EPS, ALPHA, steps)


# title -> contender -> function that makes it; ratios are to the last contender
CONTENDERS: dict[str, dict[str, Callable[[int, int], Callable[[], object]]]] = {
    "PGD on a ResNet-18": {"moe_kernels": partial(attack, True), "as usually written": partial(attack, False)},
    "RT-ER step, 4 x ResNet-18": {
        "moe_kernels, recompute='none'": partial(rt_er, "none"),
        "moe_kernels, recompute='activations'": partial(rt_er, "activations"),
        "moe_kernels, recompute='all'": partial(rt_er, "all"),
        "one image at a time": rt_er_by_image,
    },
}
STEPS = {"PGD on a ResNet-18": 10, "RT-ER step, 4 x ResNet-18": 2}
TARGETS = {"moe_kernels, recompute='all'": 1 / 3}


def status(field: str) -> float:
    """Memory of this process in MB: VmRSS, the current value, or VmHWM, the peak."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def measure(batch: int, steps: int, title: str, name: str, **environment: str) -> tuple[float, float]:
    """MB that the process held before the contender, and MB by which its peak exceeds that."""
    command = [sys.executable, __file__, str(batch), str(steps), title, name]
    out = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment}).stdout
    before, beyond = map(float, out.split())
    return before, beyond


def main(batch: int = 128, steps: int | None = None) -> None:
    print(f"| {batch} images | | held before, MB | peak, MB | ratio | target | | by default, MB |")
    print("|---|---|---|---|---|---|---|---|")
    for title, contenders in CONTENDERS.items():
        count = STEPS[title] if steps is None else steps
        found = {name: measure(batch, count, title, name, **GIVE_BACK) for name in contenders}
        *_, (_, last) = found.values()
        for name, (before, beyond) in found.items():
            _, default = measure(batch, count, title, name)
            ratio, target = beyond / last, TARGETS.get(name)
            verdict = "|" if target is None else f"<= {target:.2f} | {'met' if ratio <= target else 'missed'}"
            figures = f"{before:.0f} | {beyond:.0f} | {ratio:.2f} | {verdict} | {default:.0f}"
            print(f"| {title}, PGD-{count} | {name} | {figures} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 5:
        torch.manual_seed(0)
        run = CONTENDERS[sys.argv[3]][sys.argv[4]](int(sys.argv[1]), int(sys.argv[2]))
        before = status("VmRSS")
        run()
        print(before, status("VmHWM") - before)
    else:
        main(*map(int, sys.argv[1:]))
