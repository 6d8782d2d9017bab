"""Anybody's model is evaluated: a plain CNN, a transformer, a mixture of modules; killed, gone on to the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rter import Report, evaluate_model
from rter.evaluate import JOURNAL
from rter.journal import Journal
from torch import Tensor, nn

from moe_kernels import RobustMoE

KEYS = {
    "sa",
    "ra",
    "ra_e",
    "ra_r",
    "aa",
    "expert_load",
    "route_flip_rate",
    "eps",
    "method",
    "data",
    "seed",
    "baselines",
}
WEAK: dict[str, Any] = {"eps": "1/50", "steps": 3, "restarts": 2, "queries": 20, "batch_size": 8}


def cnn(classes: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, classes)
    )


def mixture() -> nn.Module:
    """A mixture of plain modules, inside another module."""
    torch.manual_seed(0)
    router = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    return nn.Sequential(nn.Tanh(), RobustMoE.from_experts([cnn() for _ in range(3)], router, gate="hard"))


def transformer() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=4, **sizes)
    return transformers.ViTForImageClassification(config)


MODELS = {"cnn": cnn, "mixture": mixture, "transformer": transformer}


def images(model: nn.Module, count: int = 20) -> tuple[Tensor, Tensor]:
    """Images and what the model says of them, but for one."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 3, 8, 8, generator=generator)
    with torch.no_grad():
        y = getattr(out := model.eval()(x), "logits", out).argmax(1)
    y[0] = (y[0] + 1) % 4
    model.train()
    return x, y


def timeless(report: Report) -> dict[str, Any]:
    results = [{**result, "seconds": 0} for result in report.figures["attack_results"]]
    return report.figures | {"attack_results": results}


def broken_off(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Journals stop as if killed while they write the line after so many."""
    lines = [0]
    append = Journal._append

    def dying(self: Journal, record: dict[str, Any]) -> None:
        lines[0] += 1
        if lines[0] > after:
            self.file.write(json.dumps(record).encode()[:30])
            self.file.flush()
            self.file.close()
            raise SystemExit("killed")
        append(self, record)

    monkeypatch.setattr(Journal, "_append", dying)


@pytest.mark.parametrize("kind", MODELS)
def test_a_killed_evaluation_goes_on_to_the_same_bits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[kind]()
    x, y = images(model)
    whole = evaluate_model(model, x, y, suite="quick", **WEAK)
    deaths, computed = 0, set[str]()
    for after in (1, 4, 9, 2, 10**6):
        with monkeypatch.context() as patch:
            broken_off(after, patch)
            torch.manual_seed(after)  # which nothing may depend on
            try:
                resumed = evaluate_model(model, x, y, suite="quick", out=tmp_path, **WEAK)
            except SystemExit:
                deaths += 1
                lines = (tmp_path / JOURNAL).read_bytes().splitlines()[:-1]
                parts = {json.loads(line)["part"] for line in lines[1:]}
                assert computed < parts or after == 1  # what an earlier attempt has finished is kept
                computed = parts
                assert not (tmp_path / "report.json").exists()
    assert deaths == 4 and timeless(resumed) == timeless(whole)
    assert all(torch.equal(resumed.examples[name], value) for name, value in whole.examples.items())
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "examples.safetensors"}
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(resumed.to_json())
    assert model.training and 0 < whole.verdict.value <= whole.ra.value <= whole.sa.value == 0.95
