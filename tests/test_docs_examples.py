"""The scripts of docs/examples run, on small sizes, and find what their pages say of them."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "docs/examples"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script of the test's name, which may import others beside it."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(request.node.name.removeprefix("test_"))


def test_transformer(example: ModuleType) -> None:
    losses, load = example.main((EXAMPLES / "transformer.py").read_text(), steps=30, length=16, batch=8)
    assert losses[-1] < 0.9 * losses[0] and load.shape == (8,) and load.min() > 0 and load.max() < 0.5


def test_adversarial_training(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    model = example.main(epochs=2, test_images=40)
    clean, robust = (float(line.split()[-1].rstrip("%")) for line in capsys.readouterr().out.splitlines())
    assert clean > 30 and robust <= clean and not model.training


def test_attack_a_mixture(example: ModuleType) -> None:
    left = example.main(epochs=1, steps=3, test_images=40, num_experts=2)
    together = left.pop("all of them together")
    assert len(left) == 8 and together <= min(left.values()) < left["no attack"]


def test_evaluate_a_model(example: ModuleType, tmp_path: Path) -> None:
    report = example.main(tmp_path, epochs=1, test_images=20, steps=2, suite="quick")
    assert (tmp_path / "report/report.json").exists() and report.verdict.value <= report.sa.value
    model = example.network()
    model.load_state_dict(torch.load(tmp_path / "cnn.pt"))


def test_every_example_is_run() -> None:
    elsewhere = {"image_folder"}  # in test_docs_pages.py
    here = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} - elsewhere == here - {"every_example_is_run"}
