"""The calls that `make gpu` times, on random operands."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import roofline
import torch
from gpu_device import Device
from roofline import Conv, Linear
from rt_er import ALPHA, EPS, rt_er_step
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import PGD, ExpertConv2d, ExpertResNet18, RobustMoE, pgd_step_
from moe_kernels._layout import channels_innermost

ops = torch.ops.moe_kernels
Calls = dict[str, Callable[[], Any]]


def randn(device: Device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device.name)


def even_offsets(device: Device, rows: int, experts: int) -> Tensor:
    return torch.arange(0, rows + 1, rows // experts, dtype=torch.int32, device=device.name)


class LinearCalls:
    """expert_linear and its gradients on random operands of a shape, with equally many rows for each expert."""

    def __init__(self, device: Device, shape: Linear) -> None:
        rows, k, n, experts = shape
        self.x, self.grad = randn(device, rows, k), randn(device, rows, n)
        self.weight = randn(device, experts, n, k) / k**0.5
        self.back, self.offsets = self.weight.transpose(1, 2), even_offsets(device, rows, experts)
        self.calls: Calls = {
            "forward": lambda: ops.expert_linear(self.x, self.weight, None, self.offsets, None),
            "dX": lambda: ops.expert_linear(self.grad, self.back, None, self.offsets, None),
            "dW": lambda: ops.expert_linear_weight_grad(self.grad, self.x, self.offsets, None),
        }


class ConvCalls:
    """expert_conv2d and its gradients on random operands of a shape, laid out as in the networks."""

    def __init__(self, device: Device, shape: Conv) -> None:
        images, experts, c_in, c_out, size, kernel, stride = shape
        layer = ExpertConv2d(experts, c_in, c_out, kernel, stride, kernel // 2, bias=False, device=device.name)
        self.weight = channels_innermost(layer.weight.detach(), torch.bfloat16)  # as under autocast
        self.x, self.grad = (
            randn(device, images, c, side, side).contiguous(memory_format=torch.channels_last)
            for c, side in ((c_in, size), (c_out, size // stride))
        )
        self.offsets = even_offsets(device, images, experts)
        self.steps = steps = [stride, stride], [kernel // 2, kernel // 2]
        sizes = size, size
        self.calls: Calls = {
            "forward": lambda: ops.expert_conv2d(self.x, self.weight, None, self.offsets, *steps),
            "dX": lambda: ops.expert_conv2d_input_grad(self.grad, self.weight, self.offsets, *sizes, *steps),
            "dW": lambda: ops.expert_conv2d_weight_grad(self.grad, self.x, self.offsets, kernel, kernel, *steps),
        }


def triton_calls(device: Device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A call of every Triton kernel that is timed, the convolutions of an RT-ER step first."""
    shapes = device.shapes
    batch, experts, width = shapes.rt_er
    networks = {c for n in (2, 3) for c in roofline.resnet18(n * batch, experts, width, device.attack[1])}
    layer = shapes.layer
    slots = layer.tokens * layer.top_k
    halves = Linear(slots, layer.d, 2 * layer.n, layer.experts), Linear(slots, layer.n, layer.d, layer.experts)

    def run(calls: type[LinearCalls] | type[ConvCalls], shape: Any, part: str) -> None:
        calls(device, shape).calls[part]()

    for part in ("forward", "dX", "dW"):
        for conv_shape in sorted(networks) + [c for c in shapes.conv if c not in networks]:
            yield f"expert_conv2d {part}, {conv_shape}", partial(run, ConvCalls, conv_shape, part)
        for shape in (*shapes.linear, *halves):
            yield f"expert_linear {part}, {shape}", partial(run, LinearCalls, shape, part)


def mixture(experts: int, width: int, size: int, device: str) -> RobustMoE:
    """ResNet-18 experts behind a linear router of images [B, 3, size, size]."""
    net = ExpertResNet18(experts, width=width, device=device)
    router = nn.Sequential(nn.Flatten(), nn.Linear(3 * size**2, experts, device=device))
    return RobustMoE.from_experts(net, router)


class Mixture:
    """Four ResNet-18 experts and a batch, as in `benchmarks/bench_rt_er.py`; everything under bf16 autocast."""

    def __init__(self, device: Device, images: int) -> None:
        _, experts, width = device.shapes.rt_er
        _, size, _, self.steps = device.attack
        self.device = device
        self.moe = mixture(experts, width, size, device.name)
        x = torch.rand(images, 3, size, size, device=device.name)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.y = torch.randint(10, (images,), device=device.name)

    def train(self, capture: str | bool) -> Tensor:
        with torch.autocast(self.device.name, torch.bfloat16):
            return rt_er_step(self.moe, self.x, self.y, self.steps, capture=capture)

    def attack(self, capture: str | bool) -> Tensor:
        options: dict[str, Any] = {"steps": self.steps, "best_iterate": False, "seed": 0, "capture": capture}
        with torch.autocast(self.device.name, torch.bfloat16):
            return PGD(self.moe, EPS, ALPHA, **options)(self.x, self.y)

    def attack_step(self) -> None:
        with torch.autocast(self.device.name, torch.bfloat16):
            leaf = self.x.detach().requires_grad_()
            loss = F.cross_entropy(self.moe(leaf).float(), self.y, reduction="sum")
            pgd_step_(self.x.clone(), torch.autograd.grad(loss, [leaf])[0], self.x, EPS, ALPHA)
