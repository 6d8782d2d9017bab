"""`contest`: times one of several ways to compute the same thing, after checking that it is right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

OURS = "moe_kernels"
BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # in hardware
MAX_RELATIVE_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}

Contest = Callable[..., None]


@pytest.fixture
def contest(benchmark: Any) -> Contest:
    """Times `contenders[name]`, all contenders of one `group` side by side; `exact()` is the fp64 truth.

    `targets` says of other contenders what their time, over ours, should be: {"a loop": ">= 1.3"}. `once` times a
    single run of what takes many seconds.
    """

    def run(
        group: str,
        contenders: dict[str, Callable[[], Any]],
        name: str,
        exact: Callable[[], Tensor] | None = None,
        targets: dict[str, str] | None = None,
        once: bool = False,
    ) -> None:
        if exact is not None:
            out, truth = contenders[name](), exact()
            error = (out.double() - truth).norm() / truth.norm()
            assert error <= MAX_RELATIVE_ERROR[out.dtype], f"{name} is wrong by {error:.1e}"
        benchmark.group = group
        benchmark.name = name
        if name == OURS:
            benchmark.extra_info["targets"] = targets or {}
        if once:
            benchmark.pedantic(contenders[name])
        else:
            benchmark(contenders[name])

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["bf16"] = BF16
