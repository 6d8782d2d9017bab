"""The benchmarks of `make gpu`: each result is checked, then timed against the strongest library call there is."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import peers
import roofline
import torch
from gpu_calls import ConvCalls, LinearCalls, Mixture, even_offsets, randn
from gpu_contest import Contest
from gpu_device import Device
from gpu_jobs import SECTIONS
from gpu_report import Report
from roofline import Conv, Layer, Linear, Work
from torch import Tensor
from torch.nn import functional as F

from moe_kernels import (
    RobustMoE,
    attack_mode,
    autotune,
    combine,
    group_by_expert,
    pgd_step_,
    reference,
    topk_route,
)
from moe_kernels.testing import to_double
from moe_kernels.triton_kernels import tuning

ops = torch.ops.moe_kernels
aten = torch.ops.aten


def ceilings(contest: Contest) -> None:
    """What this device achieves: a large copy and a large matrix product."""
    size, side = (2**32, 8192) if not contest.device.dry else (64, 8)
    source = torch.empty(size, dtype=torch.uint8, device=contest.device.name).random_()
    target, a, b = torch.empty_like(source), randn(contest.device, side, side), randn(contest.device, side, side)
    contest(Work("device-to-device copy", f"{size} bytes", 2 * size), lambda: target.copy_(source))
    contest(Work("cuBLAS bf16", f"{side}^3", 6 * side**2, 2 * side**3), lambda: a @ b)


def linear(contest: Contest, shape: Linear) -> None:
    works, of = roofline.linear(shape), LinearCalls(contest.device, shape)
    x, grad, weight, back, offsets = of.x, of.grad, of.weight, of.back, of.offsets
    one, ends = weight[0], offsets[1:]
    contest(
        works["forward"],
        of.calls["forward"],
        lambda: reference.expert_linear(*to_double((x, weight)), None, offsets),
        {"one dense GEMM": lambda: x @ one.T, "F.grouped_mm": lambda: F.grouped_mm(x, back, offs=ends)},
    )
    contest(
        works["dX"],
        of.calls["dX"],
        lambda: reference.expert_linear(*to_double((grad, back)), None, offsets),
        {"one dense GEMM": lambda: grad @ one, "F.grouped_mm": lambda: F.grouped_mm(grad, weight, offs=ends)},
    )
    contest(
        works["dW"],
        of.calls["dW"],
        lambda: reference.expert_linear_weight_grad(*to_double((grad, x)), offsets),
        {"one dense GEMM": lambda: grad.T @ x, "F.grouped_mm": lambda: F.grouped_mm(grad.T, x, offs=ends)},
    )


def conv(contest: Contest, shape: Conv) -> None:
    works, of = roofline.conv(shape), ConvCalls(contest.device, shape)
    x, grad, weight, steps = of.x, of.grad, of.weight, of.steps
    images, experts = shape.images, shape.experts
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
        of.calls["forward"],
        lambda: each(x.float(), weight.float()),
        {"cuDNN for each expert": lambda: each(x, weight)},
    )
    contest(
        works["dX"],
        of.calls["dX"],
        lambda: torch.cat([dx for dx, _, _ in wide(True, False)]),
        {"cuDNN for each expert": lambda: gradients(torch.bfloat16, True, False)},
    )
    contest(
        works["dW"],
        of.calls["dW"],
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
        """The layer by its definition, one expert at a time."""
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


def rt_er(contest: Contest) -> None:
    """One training step: both attacks as one batch of 2B images, the forwards as one of 3B."""
    shape = contest.device.shapes.rt_er
    mixture = Mixture(contest.device, shape[0])
    work = roofline.rt_er(shape, mixture.steps)["step"]
    for name, capture in ((", step by step", False), (", captured", "auto")):
        contest(replace(work, kernel=work.kernel + name), partial(mixture.train, capture), budget=1500)


def attack(contest: Contest) -> None:
    shape = contest.device.shapes.rt_er
    mixture = Mixture(contest.device, 2 * shape[0])
    works = roofline.attack(shape, mixture.steps)
    with attack_mode(mixture.moe):
        contest(works["step"], mixture.attack_step, budget=300)

    def same() -> None:
        assert torch.equal(mixture.attack("auto"), mixture.attack(False))

    if contest.report.check("a captured attack has the bits of one step by step", same):
        contest(works["eager"], partial(mixture.attack, False), budget=1000)
        contest(works["captured"], partial(mixture.attack, "auto"), budget=1000)


def grouped_gemms(contest: Contest) -> None:
    ceilings(contest)
    for shape in contest.device.shapes.linear:
        contest.report.check(f"benchmark of {shape}", partial(linear, contest, shape), "time")


def convolutions(contest: Contest) -> None:
    for shape in contest.device.shapes.conv:
        contest.report.check(f"benchmark of {shape}", partial(conv, contest, shape), "time")


def passes_and_routing(contest: Contest) -> None:
    for name, function in (
        ("the passes", lambda: passes(contest, contest.device.shapes)),
        ("routing", lambda: routing(contest, contest.device.shapes.layer)),
    ):
        contest.report.check(f"benchmark of {name}", function, "time")


TIMED: dict[str, Callable[[Contest], None]] = dict(
    zip(
        SECTIONS,
        (rt_er, attack, grouped_gemms, convolutions, lambda c: layer(c, c.device.shapes.layer), passes_and_routing),
        strict=True,
    )
)


def speed(device: Device, report: Report, which: str, tool: str) -> None:
    contest = Contest(device, report)
    report.check(f"benchmark of {which}", lambda: TIMED[which](contest), "time")


def tuned(device: Device, report: Report, which: str, tool: str) -> None:
    """The grouped GEMMs and convolutions again, with the tiles that autotune() finds on this device."""
    contest = Contest(device, report, "autotuned ")
    with autotune():
        for function, shapes in ((linear, device.shapes.linear), (conv, device.shapes.conv)):
            for shape in shapes:
                report.check(f"autotuned {shape}", partial(function, contest, shape), "time")
    for (kernel, *_), tile in tuning.fastest.items():
        report.add(kind="tile", kernel=kernel, tile=list(tile))
