"""autotune() picks the fastest tile that fits the device, and only inside its context."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton.runtime.errors import OutOfResources

from moe_kernels import autotune, reference
from moe_kernels.testing import Source, assert_equals
from moe_kernels.triton_kernels import configs, tuning
from moe_kernels.triton_kernels.configs import Tile
from moe_kernels.triton_kernels.expert_linear import expert_linear
from moe_kernels.triton_kernels.launch import Launch

SHIPPED = configs.EXPERT_LINEAR["default"][4]["few"]
FAST = SHIPPED._replace(n=2 * SHIPPED.n)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Tile]:
    """The tiles timed so far, on a simulated device that fits only small tiles and is fastest with FAST."""
    seen: list[Tile] = []

    def milliseconds(make: Callable[[Tile], Launch], tile: Tile) -> float:
        make(tile)
        seen.append(tile)
        return math.inf if tile.num_stages > SHIPPED.num_stages else 1.0 if tile == FAST else 2.0

    monkeypatch.setattr(tuning, "fastest", {})
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    return seen


def run(rows: int = 6) -> Tensor:
    s = Source(torch.float32)
    x, weight, offsets = s.randn(rows, 7), s.randn(2, 130, 7), s.offsets((2, rows - 2))
    y = expert_linear(x, weight, None, offsets)
    assert_equals(y, reference.expert_linear, (x, weight, None, offsets), torch.float32)
    return y


def test_tunes_once_per_magnitude_and_only_inside(timed: list[Tile], monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []
    run_launch = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (launched.append(self.arguments["BLOCK_N"]), run_launch(self)))
    run()
    assert timed == [] and launched == [SHIPPED.n]
    with autotune():
        run()
        assert len(timed) == len(set(timed)) == len(tuning.neighbours(SHIPPED)) > 5
        run(8)  # like 6, rounded up to a power of two
        assert len(timed) == len(tuning.neighbours(SHIPPED))
        run(9)
        assert len(timed) == 2 * len(tuning.neighbours(SHIPPED))
    run()
    assert launched == [SHIPPED.n, FAST.n, FAST.n, FAST.n, SHIPPED.n]


def test_nothing_is_timed_during_a_graph_capture(timed: list[Tile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_capturing", lambda: True)
    with autotune():
        run()
    assert timed == []


@pytest.mark.parametrize("shipped", [SHIPPED, Tile(16, 16, 16, 8, 1), Tile(256, 256, 64, 8, 3, tma=True)])
def test_neighbours_can_be_compiled(shipped: Tile) -> None:
    for m, n, _, _, stages, _ in tuning.neighbours(shipped):
        assert 16 <= m <= 256 and 16 <= n <= 256 and stages >= 1


@pytest.mark.parametrize(
    ("compiling", "running", "expected"),
    [
        (None, None, 1.5),
        (None, OutOfResources(300000, 232448, "shared memory"), math.inf),
        (RuntimeError("PassManager::run failed"), None, math.inf),
        (None, RuntimeError("an illegal memory access was encountered"), RuntimeError),
    ],
)
def test_a_tile_that_does_not_compile_or_fit_takes_forever(
    monkeypatch: pytest.MonkeyPatch, compiling: Exception | None, running: Exception | None, expected: Any
) -> None:
    def raises(error: Exception | None) -> float:
        if error is not None:
            raise error
        return 1.5

    monkeypatch.setattr(triton.testing, "do_bench", lambda function, **options: raises(running))
    launch = Launch(SimpleNamespace(warmup=lambda **options: raises(compiling)), (1,), {}, 4)
    if expected is RuntimeError:
        with pytest.raises(RuntimeError, match="illegal"):
            tuning.milliseconds(lambda tile: launch, SHIPPED)
    else:
        assert tuning.milliseconds(lambda tile: launch, SHIPPED) == expected
