"""PGD's steps as one recorded CUDA graph, which a stand-in simulates on the CPU, and PGD under a frozen route."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from cuda_stand_in import Cuda, install
from torch import Tensor, nn

from moe_kernels import PGD, RobustMoE
from moe_kernels.attacks import pgd
from moe_kernels.attacks.capture import repeat
from moe_kernels.testing import Source

S = Source(torch.float32)


def moe() -> RobustMoE:
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Flatten(), nn.Linear(12, 4)) for _ in range(3)]
    return RobustMoE.from_experts(experts, nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), gate="hard")


@pytest.fixture(params=[True, False], ids=["torch-2.11", "later"])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """A stand-in for CUDA in which PGD's images are on cuda:1 while cuda:0 is current."""
    cuda = Cuda(index=1, old=request.param)
    install(monkeypatch, cuda)
    device = torch.device("cuda", 1)
    monkeypatch.setattr(pgd, "repeat", lambda step, times, _: repeat(step, times, device if cuda.entered else None))
    return cuda


class Model(nn.Module):
    """Calls `visit(x)`, with the number of its calls in `calls`, before it answers."""

    def __init__(self, visit: Callable[[Tensor], object] = lambda x: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4))
        self.visit, self.calls = visit, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.visit(x)
        return self.layers(x)


OPTIONS: dict[str, Any] = {"eps": 0.3, "alpha": 0.1, "steps": 6, "seed": 0}


def found(model: nn.Module, **options: Any) -> Tensor:
    s = Source(torch.float32)
    return PGD(model, **OPTIONS | options)(s.rand(5, 3, 2, 2), s.randint(4, 5).long())


def found_on(cuda: Cuda, model: nn.Module, **options: Any) -> Tensor:
    """The result of PGD on the stand-in; asserts that everything is restored afterwards."""
    try:
        with cuda:
            return found(model, **options)
    finally:
        assert_restored(cuda)


def assert_restored(cuda: Cuda) -> None:
    assert cuda.device == 0 and cuda.current == cuda.default and cuda.sync_mode == 0
    assert not cuda.recordings
    with cuda:
        torch.cuda.empty_cache()  # torch asserts here that nothing is being recorded
        torch.rand(2)  # an error if the generator still records
    assert all(stream.waited_for for stream in cuda.default[1:])  # work on the side stream is over before ours


@pytest.mark.parametrize(
    "options", [{}, {"norm": "L2", "restarts": 2, "eps": 0.01}, {"loss": "kl", "best_iterate": False}]
)
def test_a_recorded_attack_finds_what_its_steps_find(options: dict[str, Any], cuda: Cuda) -> None:
    restarts = options.get("restarts", 1)
    assert torch.equal(found_on(cuda, Model(), **options), found(Model(), **options))
    assert (cuda.begun, cuda.replays) == (restarts, 4 * restarts)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_few_steps_are_not_recorded(steps: int, cuda: Cuda) -> None:
    with cuda:
        on_cuda = found(Model(), steps=steps)
    assert torch.equal(on_cuda, found(Model(), steps=steps))
    assert cuda.begun == 0


def test_a_model_that_waits_for_the_device_is_never_recorded(cuda: Cuda) -> None:
    def model() -> Model:
        return Model(lambda x: bool(x.sum() > 0))

    with pytest.warns(RuntimeWarning, match=r"the host waits for the device in .*test_capture\.py:\d+ \(.*x\.sum\(\)"):
        on_cuda = found_on(cuda, model(), restarts=2)
    assert torch.equal(on_cuda, found(model(), restarts=2))
    assert cuda.begun == 0


@pytest.mark.parametrize(
    "draw", [lambda x: random.random(), lambda x: np.random.rand(), lambda x: torch.default_generator.seed()]
)
def test_a_model_that_draws_on_the_host_is_never_recorded(draw: Callable[[Tensor], object], cuda: Cuda) -> None:
    with pytest.warns(RuntimeWarning, match="draw random numbers on the host"):
        found_on(cuda, Model(draw))
    assert cuda.begun == 0


@pytest.mark.parametrize("call", [1, 2])
def test_kernels_of_the_first_two_steps_are_loaded_before_the_recording(call: int, cuda: Cuda) -> None:
    model = Model()
    model.visit = lambda x: cuda.prohibited() if model.calls == call else None
    assert torch.equal(found_on(cuda, model), found(Model()))
    assert cuda.replays == 4


def test_a_failed_recording_leaves_nothing_behind(cuda: Cuda) -> None:
    """The recording of the third step fails because memory is allocated during it."""
    model = Model()
    model.visit = lambda x: cuda.prohibited() if model.calls == 3 else None
    with pytest.warns(
        RuntimeWarning, match=r"the recording failed in .*test_capture\.py:\d+ .*: CUDA error: operation"
    ):
        on_cuda = found_on(cuda, model)
    assert torch.equal(on_cuda, found(Model()))
    assert cuda.replays == 0
    assert torch.equal(found_on(cuda, Model()), on_cuda)  # the next attack is recorded
    assert cuda.replays == 4


@pytest.mark.parametrize("fault", [ValueError("a fault"), KeyboardInterrupt()])
@pytest.mark.parametrize("invalidates", [False, True])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_other_faults_of_a_step_are_raised(call: int, invalidates: bool, fault: BaseException, cuda: Cuda) -> None:
    model = Model()

    def visit(x: Tensor) -> None:
        if model.calls == call:
            if invalidates:
                with suppress(RuntimeError):
                    cuda.prohibited()
            raise fault

    model.visit = visit
    with pytest.raises(type(fault)):
        found_on(cuda, model)


def test_another_thread_may_pin_memory_meanwhile(cuda: Cuda) -> None:
    def pin(x: Tensor) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(cuda.prohibited).result()

    found_on(cuda, Model(pin))
    assert cuda.replays == 4


def test_the_stand_in_fails_as_cuda_does(cuda: Cuda) -> None:
    """The attack has to repair what torch.cuda.graph leaves after an error: its stream stays current and, before torch
    2.12, the generator and the allocator go on recording."""
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="previous error"), cuda, torch.cuda.graph(graph):
        cuda.prohibited()
    assert cuda.current[0] is not cuda.default[0]
    assert (cuda.generator_records, len(cuda.underway)) == ((True, 1) if cuda.old else (False, 0))
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        graph.replay()


def test_every_step_writes_in_place() -> None:
    """As a replay needs it: every later step uses the same tensors as the second one."""
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
        ("freeze_routing needs a model with a method route, got Linear", {"freeze_routing": True}),
    ],
)
def test_bad_settings(match: str, options: dict[str, Any]) -> None:
    make: Callable[..., PGD] = PGD
    with pytest.raises(ValueError, match=match):
        make(nn.Linear(2, 2), **options)
