"""PGD's steps as one recorded graph, and under a frozen route; on a CPU the recording is played by a stand-in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_kernels import PGD, RobustMoE
from moe_kernels.attacks.capture import repeat
from moe_kernels.testing import Source

S = Source(torch.float32)


def moe() -> RobustMoE:
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Flatten(), nn.Linear(12, 4)) for _ in range(3)]
    return RobustMoE.from_experts(experts, nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), gate="hard")


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_is_recorded_once_or_called_every_time(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Graph:
        def replay(self) -> None:
            calls.append("replayed")

    @contextmanager
    def record(graph: Graph, stream: Any) -> Iterator[None]:
        recorded = len(calls)
        yield
        del calls[recorded:]  # a recording runs nothing
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    class Stream:
        def wait_stream(self, other: "Stream") -> None: ...

    for name, value in {
        "CUDAGraph": Graph,
        "graph": record,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda s: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    repeat(lambda: calls.append("called"), 5, capture=True)
    assert calls == ["called", *["called" if fails else "replayed"] * 4]


def test_every_step_writes_in_place() -> None:
    """What a replay needs: the second step's tensors are those of every later one."""
    x, y = S.rand(5, 3, 2, 2), S.randint(4, 5).long()
    addresses: list[tuple[int, ...]] = []

    class Watched(PGD):
        def _gradient(self, objective: Tensor, leaf: Tensor) -> Tensor:
            addresses.append((leaf.data_ptr(), self._counts.data_ptr()))
            return super()._gradient(objective, leaf)

    Watched(moe(), 0.1, 0.05, 4, seed=0)(x, y)
    assert len(addresses) == 4 and len(set(addresses)) == 1


def test_a_frozen_route_gives_the_gradients_and_the_live_one_judges() -> None:
    net, x, y = moe(), S.rand(40, 3, 2, 2), S.randint(4, 40).long()
    options: dict[str, Any] = {"eps": 0.4, "alpha": 0.2, "steps": 5, "random_start": False, "freeze_routing": True}
    x_adv = PGD(net, best_iterate=False, **options)(x, y)
    assert (net.route(x_adv).experts != net.route(x).experts).any()
    given = PGD(net, 0.4, 0.2, 5, random_start=False, best_iterate=False)(x, y, routing=net.route(x))
    assert torch.equal(x_adv, given)
    assert torch.equal(PGD(net, **options)(x, y), x_adv)
    starts: dict[str, Any] = {"eps": 0.4, "steps": 0, "restarts": 5, "seed": 0}
    live = PGD(net, **starts)(x, y)
    assert torch.equal(PGD(net, freeze_routing=True, **starts)(x, y), live)
    assert not torch.equal(PGD(net, **starts)(x, y, routing=net.route(x)), live)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("capture must be 'auto' or False, got True", {"capture": True}),
        ("freeze_routing must be False for a model without a method route, Linear", {"freeze_routing": True}),
    ],
)
def test_bad_settings(match: str, options: dict[str, Any]) -> None:
    make: Callable[..., PGD] = PGD
    with pytest.raises(ValueError, match=match):
        make(nn.Linear(2, 2), **options)
