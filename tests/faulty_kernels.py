"""Kernels with faults that checks/gpu_static.py must find, and the same without; prints its verdict on each."""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "checks"))

import gpu_static
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton_kernels import expert_conv2d
from moe_kernels.triton_kernels.launch import Launch

ARCH = 80


@triton.jit
def _product_kernel(x, y, n, SHARED: tl.constexpr, CONDITION: tl.constexpr):
    place = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    acc = tl.zeros((32, 32), tl.float32)
    other = acc
    for k in range(n):
        a = tl.load(x + k * 1024 + place)
        acc = tl.dot(a, a, acc)
        if CONDITION and SHARED:
            if k % 2 == 0:
                acc += tl.dot(a.trans(), a)
        elif SHARED:
            acc = tl.dot(a.trans(), a, acc)
        else:
            other = tl.dot(a.trans(), a, other)
    if n % 2 == 0:  # a tail beyond the loop
        acc = tl.dot(tl.load(x + place), tl.load(x + place), acc)
    tl.store(y + place, acc + other)


def product(shared: bool, condition: bool) -> Launch:
    x = torch.empty(4, 32, 32, dtype=torch.bfloat16, device="meta")
    arguments = {"x": x, "y": x.float(), "n": 4, "SHARED": shared, "CONDITION": condition}
    return Launch(_product_kernel, (1,), arguments, num_warps=4, num_stages=2, tensor_cores=True)


def convolution(weight: Tensor) -> Launch:
    """A launch that reads the weight in its own memory layout."""
    launches = {name: launch for arch, name, launch in expert_conv2d.static_launches() if arch == ARCH}
    launch = launches["expert_conv2d forward 16-bit 64 to 64 stride 1"]
    changed = {"weight": weight}
    changed |= {f"w_stride_{axis}": stride for axis, stride in zip("eochw", weight.stride(), strict=True)}
    return dataclasses.replace(launch, arguments={**launch.arguments, **changed})


def main() -> None:
    weight = torch.empty(4, 64, 64, 3, 3, dtype=torch.bfloat16, device="meta")
    for name, launch in {
        "two accumulators": product(shared=False, condition=False),
        "one accumulator": product(shared=True, condition=False),
        "one accumulator on a condition": product(shared=True, condition=True),
        "channels innermost": convolution(expert_conv2d.channels_innermost(weight)),
        "taps innermost": convolution(weight),
    }.items():
        (report,) = gpu_static.triton_kernel(name, launch, ARCH)
        print(f"{name}: {', '.join(report.faults()) or 'sound'}")


if __name__ == "__main__":
    main()
