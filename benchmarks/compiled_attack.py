"""What compile=True gains: `python benchmarks/compiled_attack.py [--case NAME] [--repeats N]`.

Times PGD with and without compile=True, in turns, on two threads, in fp32, and prints the minimum over the repeats
after a first call of each. The first call of the compiled attack compiles; torch caches the result on disk for later
processes.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from moe_kernels import PGD
from moe_kernels.testing.networks import ResNet18, ViT, randomize_statistics

# network, images, pixels, steps
CASES: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "ResNet-18 of width 16, 8 images of 32 pixels, PGD-10": (lambda: ResNet18(width=16), 8, 32, 10),
    "ResNet-18, 32 images of 32 pixels, PGD-10": (ResNet18, 32, 32, 10),
    "ViT-S/16, 8 images of 224 pixels, PGD-3": (ViT, 8, 224, 3),
}


def compare(case: str, repeats: int) -> tuple[float, dict[bool, float]]:
    """Seconds of the first call of the compiled attack, and the minimum over later calls by `compile`."""
    make, images, pixels, steps = CASES[case]
    torch.manual_seed(0)
    model = randomize_statistics(make()).eval()
    x, y = torch.rand(images, 3, pixels, pixels), torch.randint(10, (images,))
    attacks = {flag: PGD(model, steps=steps, best_iterate=False, seed=0, compile=flag) for flag in (False, True)}
    first, seconds = {}, {flag: [] for flag in attacks}
    for i in range(1 + repeats):
        for flag, attack in attacks.items():
            started = time.perf_counter()
            attack(x, y)
            taken = time.perf_counter() - started
            if i == 0:
                first[flag] = taken
            else:
                seconds[flag].append(taken)
    return first[True], {flag: min(times) for flag, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="one of them; default: all")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(2)
    for case in args.case or CASES:
        first, best = compare(case, args.repeats)
        ratio = best[False] / best[True]
        print(f"{case}: {best[True]:.3g} s compiled, {best[False]:.3g} s not ({ratio:.2f} x); first call {first:.3g} s")


if __name__ == "__main__":
    main()
