"""`contest`: times one of several ways to compute the same thing, after checking its result."""

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import build_info

OURS = "moe_kernels"
BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # in hardware
MAX_RELATIVE_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
# For a ResNet-18's input gradient: a ReLU that flips changes it by 2e-3, bf16 alone by 0.07 to 0.13.
MAX_GRADIENT_ERROR = {torch.float32: 1e-2, torch.bfloat16: 0.2}

Contest = Callable[..., None]


ROUND, ALL_ROUNDS = 0.01, 2.0  # seconds that a round and all rounds of a contender should take


def first_is_core(values: list[Any]) -> list[Any]:
    return [pytest.param(values[0], marks=pytest.mark.core), *values[1:]]


@pytest.fixture
def contest(benchmark: Any) -> Contest:
    """Times `contenders[name]`; `group` names the table of all contenders, `exact()` is the fp64 result.

    The speed of a machine varies, so every round of a rival follows one of ours, and the ratio is the median over such
    pairs; before each round there is an untimed call, as there would be in a loop. `targets` gives the ratio that each
    rival should have, as in {"a loop": ">= 1.3"}. A round is several calls; give `rounds` for what takes many seconds.
    """

    def run(
        group: str,
        contenders: dict[str, Callable[[], Any]],
        name: str,
        exact: Callable[[], Tensor] | None = None,
        targets: dict[str, str] | None = None,
        rounds: int | None = None,
    ) -> None:
        ours, this, seconds = contenders[OURS], contenders[name], list[float]()
        if exact is not None:
            out, truth = this(), exact()
            error = (out.double() - truth).norm() / truth.norm()
            assert error <= MAX_RELATIVE_ERROR[out.dtype], f"{name} is wrong by {error:.1e}"
        calls = 1
        if rounds is None:
            once = seconds_of(ours)
            calls = max(1, round(ROUND / once))
            rounds = min(max(2, round(ALL_ROUNDS / (once * calls))), 50)

        def setup() -> None:
            if name != OURS:
                seconds.append(seconds_of(ours, calls))
            this()

        benchmark.group, benchmark.name = group, name
        benchmark.extra_info |= {"calls": calls, "targets": targets or {}}
        benchmark.pedantic(partial(repeat, this, calls), setup=setup, rounds=rounds)
        if seconds and benchmark.enabled:
            pairs = zip(benchmark.stats.stats.data, seconds, strict=True)
            ratio = statistics.median(t / o for t, o in pairs)
            benchmark.extra_info |= {"ratio": ratio, "ours": statistics.median(seconds)}

    return run


def second_step(model: nn.Module, attack: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """Where the second step of an attack differentiates the model, and the direction of the gradient there."""
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if x.requires_grad:
            x.register_hook(lambda grad: seen.append((x.detach().double(), unit(grad))))

    with model.register_forward_pre_hook(watch):
        attack()
    _, second = seen
    return second


def direction(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The direction of the gradient of the cross-entropy at x."""
    leaf = x.detach().requires_grad_()
    return unit(torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)[0])


def unit(x: Tensor) -> Tensor:
    return x.double() / x.double().norm()


def repeat(function: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        function()


def seconds_of(function: Callable[[], Any], calls: int = 1) -> float:
    """How long `calls` calls take, after an untimed one."""
    function()
    begin = time.perf_counter()
    repeat(function, calls)
    return time.perf_counter() - begin


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["bf16"] = BF16
    machine_info["kernels"] = build_info()["cpu_level"]
    machine_info["huge_pages"] = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
