"""The benchmarks of `make gpu`: each result is checked, then timed beside the strongest library call there is."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import peers
import roofline
import torch
from gpu_device import Device
from gpu_report import Report
from roofline import Conv, Layer, Linear, Work
from rt_er import rt_er_step
from torch import Tensor
from torch.nn import functional as F

from moe_kernels import (
    ExpertResNet18,
    RobustMoE,
    autotune,
    combine,
    group_by_expert,
    pgd_step_,
    reference,
    topk_route,
)
from moe_kernels.testing import as_tuple, to_double
from moe_kernels.triton_kernels import tuning

ops = torch.ops.moe_kernels
aten = torch.ops.aten
MAX_RELATIVE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Contest:
    """Times kernels on one device into one report, their names after `prefix`."""

    def __init__(self, device: Device, report: Report, prefix: str = "") -> None:
        self.device, self.report, self.prefix = device, report, prefix

    def __call__(
        self,
        work: Work,
        ours: Callable[[], Any],
        exact: Callable[[], Any] | None = None,
        beside: dict[str, Callable[[], Any]] | None = None,
        budget: int = 100,
    ) -> None:
        """Our time beside the floor and the others' times; nothing where the result is not the exact one."""
        kernel = self.prefix + work.kernel
        name = f"{kernel}, {work.shape}"
        if exact is not None and not self.report.check(f"right: {name}", lambda: check_result(ours(), exact())):
            return
        times: dict[str, float] = {}
        for who, function in ({"ours": ours} | (beside or {})).items():
            self.report.check(f"time of {who}: {name}", partial(self._time, times, who, function, budget), "time")
        if "ours" in times:
            seconds = times["ours"] / 1e3
            self.report.add(
                kind="speed",
                kernel=kernel,
                shape=work.shape,
                ms=times.pop("ours"),
                floor_ms=work.floor * 1e3,
                tflops=work.flops / seconds / 1e12,
                gb_per_s=work.bytes / seconds / 1e9,
                beside_ms=times,
            )

    def _time(self, times: dict[str, float], who: str, function: Callable[[], Any], budget: int) -> None:
        times[who] = self.device.milliseconds(function, budget)


def check_result(out: Any, exact: Any) -> None:
    for ours, theirs in zip(as_tuple(out), as_tuple(exact), strict=True):
        ours = ours.detach()
        if not theirs.is_floating_point():
            assert torch.equal(ours.long(), theirs.long()), "integers differ"
            continue
        error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        assert error <= MAX_RELATIVE_ERROR[ours.dtype], f"wrong by {error:.1e}"


def randn(device: Device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device.name)


def even_offsets(device: Device, rows: int, experts: int) -> Tensor:
    return torch.arange(0, rows + 1, rows // experts, dtype=torch.int32, device=device.name)


def ceilings(contest: Contest) -> None:
    """What this very device reaches: a large copy and a large matrix product."""
    size, side = (2**32, 8192) if not contest.device.dry else (64, 8)
    source = torch.empty(size, dtype=torch.uint8, device=contest.device.name).random_()
    target, a, b = torch.empty_like(source), randn(contest.device, side, side), randn(contest.device, side, side)
    contest(Work("device-to-device copy", f"{size} bytes", 2 * size), lambda: target.copy_(source))
    contest(Work("cuBLAS bf16", f"{side}^3", 6 * side**2, 2 * side**3), lambda: a @ b)


def linear(contest: Contest, shape: Linear) -> None:
    rows, k, n, experts = shape
    device, works = contest.device, roofline.linear(shape)
    x, grad, weight = randn(device, rows, k), randn(device, rows, n), randn(device, experts, n, k) / k**0.5
    offsets = even_offsets(device, rows, experts)
    back, one = weight.transpose(1, 2), weight[0]
    contest(
        works["forward"],
        lambda: ops.expert_linear(x, weight, None, offsets, None),
        lambda: reference.expert_linear(*to_double((x, weight)), None, offsets),
        {"one dense GEMM": lambda: x @ one.T, "F.grouped_mm": lambda: F.grouped_mm(x, back, offs=offsets[1:])},
    )
    contest(
        works["dX"],
        lambda: ops.expert_linear(grad, back, None, offsets, None),
        lambda: reference.expert_linear(*to_double((grad, back)), None, offsets),
        {"one dense GEMM": lambda: grad @ one, "F.grouped_mm": lambda: F.grouped_mm(grad, weight, offs=offsets[1:])},
    )
    contest(
        works["dW"],
        lambda: ops.expert_linear_weight_grad(grad, x, offsets, None),
        lambda: reference.expert_linear_weight_grad(*to_double((grad, x)), offsets),
        {"one dense GEMM": lambda: grad.T @ x, "F.grouped_mm": lambda: F.grouped_mm(grad.T, x, offs=offsets[1:])},
    )


def conv(contest: Contest, shape: Conv) -> None:
    images, experts, c_in, c_out, size, kernel, stride = shape
    device, works = contest.device, roofline.conv(shape)
    weight = randn(device, experts, c_out, kernel, kernel, c_in).permute(0, 1, 4, 2, 3) / (c_in * kernel**2) ** 0.5
    x = randn(device, images, c_in, size, size).contiguous(memory_format=torch.channels_last)
    out = images, c_out, size // stride, size // stride
    grad = randn(device, *out).contiguous(memory_format=torch.channels_last)
    offsets = even_offsets(device, images, experts)
    steps = [stride, stride], [kernel // 2, kernel // 2]
    groups = [slice(i * images // experts, (i + 1) * images // experts) for i in range(experts)]

    def each(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([F.conv2d(x[g], w, None, *steps) for g, w in zip(groups, weight, strict=True)])

    def gradients(dtype: torch.dtype, *needed: bool) -> list[tuple[Tensor, ...]]:
        settings = None, *steps, [1, 1], False, [0, 0], 1, [*needed, False]
        sliced = [(grad[g].to(dtype), x[g].to(dtype), w.to(dtype)) for g, w in zip(groups, weight, strict=True)]
        return [aten.convolution_backward(*operands, *settings) for operands in sliced]

    def wide(*needed: bool) -> list[tuple[Tensor, ...]]:
        return gradients(torch.float32, *needed)

    contest(
        works["forward"],
        lambda: ops.expert_conv2d(x, weight, None, offsets, *steps),
        lambda: each(x.float(), weight.float()),
        {"cuDNN for each expert": lambda: each(x, weight)},
    )
    contest(
        works["dX"],
        lambda: ops.expert_conv2d_input_grad(grad, weight, offsets, size, size, *steps),
        lambda: torch.cat([dx for dx, _, _ in wide(True, False)]),
        {"cuDNN for each expert": lambda: gradients(torch.bfloat16, True, False)},
    )
    contest(
        works["dW"],
        lambda: ops.expert_conv2d_weight_grad(grad, x, offsets, kernel, kernel, *steps),
        lambda: torch.stack([dw for _, dw, _ in wide(False, True)]),
        {"cuDNN for each expert": lambda: gradients(torch.bfloat16, False, True)},
    )


def routing(contest: Contest, shape: Layer) -> None:
    tokens, d, _, experts, k = shape
    device, works = contest.device, roofline.routing(shape)
    logits, grad = (randn(device, tokens, e, dtype=torch.float32) for e in (experts, k))
    weights, chosen = topk_route(logits, k)
    _, position, _ = group_by_expert(chosen, experts)
    y, dout = randn(device, tokens * k, d), randn(device, tokens, d)
    contest(
        works["topk_route"],
        lambda: topk_route(logits, k),
        lambda: reference.topk_route(logits.double(), k),
        {"softmax, topk": lambda: logits.softmax(-1).topk(k)},
    )
    contest(
        works["topk_route backward"],
        lambda: ops.topk_route_backward(grad, logits, chosen, "softmax", True),
        lambda: reference.topk_route_backward(*to_double((grad, logits)), chosen, "softmax", True),
    )
    contest(
        works["group_by_expert"],
        lambda: group_by_expert(chosen, experts),
        lambda: reference.group_by_expert(chosen, experts),
        {"stable argsort": lambda: chosen.flatten().argsort(stable=True)},
    )
    order = position.flatten().long().argsort()
    contest(
        works["combine"],
        lambda: combine(y, weights, position),
        lambda: reference.combine(y.float(), weights, position),
        {"index_add": lambda: peers.combine(y, weights, order)},
    )
    contest(
        works["combine dY"],
        lambda: ops.combine_input_grad(dout, weights, position),
        lambda: reference.combine_input_grad(dout.float(), weights, position),
    )


def layer(contest: Contest, shape: Layer) -> None:
    tokens, d, n, experts, k = shape
    device, works = contest.device, roofline.layer(shape)
    moe = RobustMoE(d, n, experts, k, activation="swiglu", bias=False, device=device.name, dtype=torch.bfloat16)
    x, grad = randn(device, tokens, d).requires_grad_(), randn(device, tokens, d)
    rows, hidden = randn(device, tokens * k, d), randn(device, tokens * k, n)
    ends = even_offsets(device, tokens * k, experts)[1:]
    up, down = moe.experts.up.weight, moe.experts.down.weight
    gemms = lambda: (F.grouped_mm(rows, up.transpose(1, 2), offs=ends), F.grouped_mm(hidden, down.mT, offs=ends))  # noqa: E731

    @torch.no_grad()
    def loop() -> Tensor:
        """The layer as its definition, each expert alone."""
        weights, chosen = topk_route(moe.router(x), k)
        out = torch.zeros(tokens, d, device=device.name)
        for e in range(experts):
            row, slot = (chosen == e).nonzero(as_tuple=True)
            gate, value = F.linear(x[row].float(), up[e].float()).chunk(2, dim=1)
            out.index_add_(0, row, weights[row, slot, None] * F.linear(F.silu(gate) * value, down[e].float()))
        return out

    contest(works["forward"], lambda: moe(x), loop, {"its GEMMs alone, F.grouped_mm": gemms}, 500)
    y = moe(x)
    wanted = [x, *moe.parameters()]
    contest(works["backward"], lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True), budget=500)


def passes(contest: Contest, shapes: roofline.Shapes) -> None:
    device, works = contest.device, roofline.elementwise(shapes)
    x = torch.rand(shapes.images, device=device.name)
    x_adv, grad = x.clone(), torch.randn_like(x)
    contest(
        works["pgd_step_"],
        lambda: pgd_step_(x_adv, grad, x, 8 / 255, 2 / 255),
        None,  # it works in place: its cases are checked
        {"seven elementwise kernels": lambda: peers.pgd_step(x_adv, grad, x, 8 / 255, 2 / 255)},
    )
    values = randn(device, *shapes.activations).contiguous(memory_format=torch.channels_last)
    bits = ops.mask_relu_forward(values)[1]
    contest(
        works["mask_relu forward"],
        lambda: ops.mask_relu_forward(values)[0],
        lambda: values.relu(),
        {"torch.relu": lambda: values.relu()},
    )
    contest(
        works["mask_relu backward"],
        lambda: ops.mask_relu_backward(values, bits, True),
        lambda: torch.where(values > 0, values, 0),
        {"torch's": lambda: aten.threshold_backward(values, values, 0)},
    )
    experts = shapes.rt_er[1]
    table = torch.ones(experts, values.shape[1], device=device.name)
    arguments = table, table, None, None, even_offsets(device, len(values), experts), True, 1e-5
    contest(
        works["expert_batch_norm forward"],
        lambda: ops.expert_batch_norm_forward(values, *arguments)[0],
        lambda: reference.expert_batch_norm_forward(values.float(), *arguments)[0],
        {"F.batch_norm, one expert": lambda: F.batch_norm(values, None, None, training=True)},
    )


def rt_er(contest: Contest, shape: tuple[int, int, int], size: int, steps: int) -> None:
    """One training step under bf16 autocast: both attacks as one batch of 2 B, the forwards as one of 3 B."""
    batch, experts, width = shape
    device, works = contest.device, roofline.rt_er(shape, steps)
    net = ExpertResNet18(experts, width=width, device=device.name)
    router = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * size**2, experts, device=device.name))
    moe = RobustMoE.from_experts(net, router)
    x = torch.rand(batch, 3, size, size, device=device.name).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,), device=device.name)

    def step() -> None:
        with torch.autocast(device.name, torch.bfloat16):
            rt_er_step(moe, x, y, steps)

    contest(works["step"], step, budget=4000)


def speed(device: Device, report: Report, tool: str | None, shard: int) -> None:
    contest, shapes = Contest(device, report), device.shapes
    _, size, _, steps = device.attack
    sections: Sequence[tuple[str, Callable[[], None]]] = [
        ("ceilings", lambda: ceilings(contest)),
        *((f"expert_linear {s}", partial(linear, contest, s)) for s in shapes.linear),
        ("passes", lambda: passes(contest, shapes)),
        ("routing", lambda: routing(contest, shapes.layer)),
        *((f"expert_conv2d {s}", partial(conv, contest, s)) for s in shapes.conv),
        ("layer", lambda: layer(contest, shapes.layer)),
        ("RT-ER step", lambda: rt_er(contest, shapes.rt_er, size, steps)),
    ]
    for name, section in sections:
        report.check(f"benchmark of {name}", section, "time")


def tuned(device: Device, report: Report, tool: str | None, shard: int) -> None:
    """The grouped GEMMs and convolutions once more, with the tiles that autotune() finds here."""
    contest = Contest(device, report, "autotuned ")
    with autotune():
        for function, shapes in ((linear, device.shapes.linear), (conv, device.shapes.conv)):
            for shape in shapes:
                report.check(f"autotuned {shape}", partial(function, contest, shape), "time")
    for (kernel, *_), tile in tuning.fastest.items():
        report.add(kind="tile", kernel=kernel, tile=list(tile))
