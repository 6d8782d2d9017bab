"""Measures and draws the README's picture, in a minute on two cores:

THP_MEM_ALLOC_ENABLE=1 python benchmarks/plot_front_page.py OUT.svg
"""

import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from bench_attack import BY_HAND, CONTENDERS, TRAINABLE, model_and_images
from bench_rt_er import images, make_experts, make_router
from peers import OneImageAtATime
from peers import rt_er_step as rt_er_step_by_image
from rt_er import ALPHA, EPS, rt_er_step
from saved_bytes import NETWORKS, RECOMPUTING, per_image

from moe_kernels import RobustMoE, build_info

matplotlib.use("svg")
from matplotlib import pyplot as plt

OURS, OTHERS = "#4477aa", "#bbbbbb"
ATTACKS = {  # the bar's label: the contender of bench_attack.py
    "PyTorch": TRAINABLE,
    "torchattacks": "torchattacks",
    "PyTorch, tuned by hand": BY_HAND,
    "moe_kernels": "moe_kernels",
}


def seconds_in_turns(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median time of each contender; they take turns, since the speed of a machine varies."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(each) for name, each in seconds.items()}


def of_attacks() -> dict[str, float]:
    model, x, y = model_and_images("ResNet-18", 32, 32)
    contenders = {}
    for label, name in ATTACKS.items():
        prepare, attack = CONTENDERS[name]
        contenders[label] = partial(attack, prepare(model), x, y, steps=10)
        attack(prepare(model), x, y, steps=1)
    return seconds_in_turns(contenders, rounds=1)


def of_rt_er_steps() -> dict[str, float]:
    router, experts = make_router(), make_experts()
    moe, loop = RobustMoE.from_experts(experts, router, gate="hard"), OneImageAtATime.of(experts, router)
    x, y = images(32)
    rt_er_step(moe, x, y, 1, random_start=False)
    contenders = {
        "PyTorch, image by image": partial(rt_er_step_by_image, loop, x, y, EPS, ALPHA, 10),
        "moe_kernels": partial(rt_er_step, moe, x, y, 10, random_start=False),
    }
    return seconds_in_turns(contenders, rounds=1)


def of_memory() -> dict[str, float]:
    kept = {}
    for name in ("ResNet-18", "ViT-S/16"):
        build, size, _ = NETWORKS[name]
        net = build().eval()
        kept[f"{name}, PyTorch"] = per_image(net, size, False) / 1e6
        kept[f"{name}, moe_kernels"] = per_image(net, size, False, RECOMPUTING) / 1e6
    return kept


def draw(axes: plt.Axes, values: dict[str, float], title: str, unit: str) -> None:
    colours = [OURS if "moe_kernels" in name else OTHERS for name in values]
    axes.barh(list(values), list(values.values()), color=colours)
    for y, value in enumerate(values.values()):
        axes.text(value, y, f" {value:.3g} {unit}", va="center")
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xlim(0, 1.25 * max(values.values()))
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def machine() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = cpu[1] if cpu else "CPU"
    level = build_info()["cpu_level"].partition(" ")[0]
    return f"{name}, {level}, {torch.get_num_threads()} threads, torch {torch.__version__}, fp32"


def main() -> None:
    torch.manual_seed(0)
    attacks, steps, memory = of_attacks(), of_rt_er_steps(), of_memory()
    figure, axes = plt.subplots(3, figsize=(8, 5), height_ratios=[4, 2, 4], layout="constrained")
    draw(axes[0], attacks, "PGD-10 on a ResNet-18, 32 images of CIFAR-10's size", "s")
    draw(axes[1], steps, "RT-ER step of four ResNet-18 experts, 32 images, two PGD-10", "s")
    draw(axes[2], memory, "kept for the input gradient, per image (ViT: 224 x 224)", "MB")
    figure.supxlabel(machine(), fontsize="small", color="#666666")
    figure.savefig(Path(sys.argv[1]), metadata={"Date": None})


if __name__ == "__main__":
    main()
