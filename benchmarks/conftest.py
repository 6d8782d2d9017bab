"""`contest`: times one of several ways to compute the same thing, after checking that it is right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

OURS = "moe_kernels"
MAX_RELATIVE_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}

Contest = Callable[..., None]


@pytest.fixture
def contest(benchmark: Any) -> Contest:
    """Times `contenders[name]`, all contenders of one `group` side by side; `exact()` is the fp64 truth.

    `target` is (other contender, factor), or several: ours should take at most 1 / factor of the other's time.
    """

    def run(
        group: str,
        contenders: dict[str, Callable[[], Any]],
        name: str,
        exact: Callable[[], Tensor] | None = None,
        target: tuple[str, float] | list[tuple[str, float]] | None = None,
    ) -> None:
        if exact is not None:
            out, truth = contenders[name](), exact()
            error = (out.double() - truth).norm() / truth.norm()
            assert error <= MAX_RELATIVE_ERROR[out.dtype], f"{name} is wrong by {error:.1e}"
        benchmark.group = group
        benchmark.name = name
        if name == OURS and target:
            benchmark.extra_info["target"] = target if isinstance(target, list) else [target]
        benchmark(contenders[name])

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
