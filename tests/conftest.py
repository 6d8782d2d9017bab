"""Every test runs with new memory filled with NaN, so that an element that is never written shows."""

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from rter.data.split import Split
    from rter.models.classifier import RobustClassifier

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

# A shell ignores Ctrl-C in what it runs in the background, and so would the processes that tests start and interrupt.
if threading.current_thread() is threading.main_thread():  # the only one that may
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded_sources(request: pytest.FixtureRequest) -> None:
    """Restarts a module's sources for each test, so that their numbers do not depend on the tests run before."""
    from moe_kernels.testing import Source

    for value in vars(request.module).values():
        if isinstance(value, Source):
            value.generator.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attack without a seed takes 0, 1, ... in each test, so that none fails once in a hundred runs."""
    from moe_kernels.attacks.attack import Attack

    seeds, own = itertools.count(), Attack._generator

    def generator(attack: Attack, x: torch.Tensor) -> torch.Generator:
        return torch.Generator(x.device).manual_seed(next(seeds)) if attack.seed is None else own(attack, x)

    monkeypatch.setattr(Attack, "_generator", generator)


@pytest.fixture
def rules_for_few_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules of attack_mode apply to tensors of any size."""
    from moe_kernels.attacks import rules

    monkeypatch.setattr(rules, "MIN_ELEMENTS", 0)


@pytest.fixture(scope="session")
def robust_digits(tmp_path_factory: pytest.TempPathFactory) -> "tuple[RobustClassifier, Split]":
    """Three small experts trained by PGD-AT for a few seconds, in eval mode, and the held-out images."""
    from rter.checkpoint import load_weights
    from rter.data.load import load_data
    from rter.models.build import build_model
    from rter.settings import make_config
    from rter.train import train

    settings = {"num_experts": 3, "width": 4, "epochs": 6, "attack_steps": 2, "eps": 0.15, "alpha_ratio": 0.6}
    config = make_config(method="pgd-at", batch_size=120, lr=2e-2, eval_every=6, held_out=120, **settings)
    run = tmp_path_factory.mktemp("robust") / "digits"
    train(config, run)
    data = load_data(config.data, config.held_out, config.seed)
    model = build_model(config, data).eval()
    load_weights(run / "last.safetensors", model)
    return model, data.held_out


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny `rter demo`, each module's own."""
    from rter.__main__ import main
    from runs import TINY, WEAK

    out = tmp_path_factory.mktemp("runs") / "demo"
    assert main(["demo", "--out", str(out), *TINY, *WEAK]) == 0
    return out
