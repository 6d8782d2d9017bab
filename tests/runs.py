"""Checks of the folder of a run, and flags for the least work, that several test files share."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rter.checkpoint import load_tensors, read_lines
from rter.journal import Journal

TINY = ["--epochs", "2", "--batch-size", "400", "--num-experts", "2", "--width", "2", "--attack-steps", "1",
        "--held-out", "60", "--eval-every", "1"]  # fmt: skip
WEAK = ["--suite", "quick", "--steps", "2", "--restarts", "2"]


def assert_same_run(run: Path, expected: Path) -> None:
    """Asserts that two runs have the same files and, bit for bit, the same weights and metrics, apart from seconds."""
    for name in ("last.safetensors", "best.safetensors"):
        tensors, others = load_tensors(run / name), load_tensors(expected / name)
        assert tensors.keys() == others.keys() and all(torch.equal(tensors[key], others[key]) for key in tensors)
    lines, others = ([{**line, "seconds": 0} for line in read_lines(r / "metrics.jsonl")] for r in (run, expected))
    assert lines == others
    assert (run / "metrics.csv").read_text().count("\n") == len(lines) + 1
    assert {path.name for path in run.iterdir()} == {path.name for path in expected.iterdir()}


def assert_equal_to_rounding(run: Path, expected: Path, terms: int) -> None:
    """Within 1e-3: signs of gradients, in attacks, amplify rounding from step to step. An epoch has so many terms."""
    for name in ("resume.safetensors", "last.safetensors"):
        tensors, others = (load_tensors(r / name) for r in (run, expected))
        assert tensors.keys() == others.keys()
        for key, tensor in others.items():
            assert tensors[key].shape == tensor.shape
            assert (tensors[key].double() - tensor.double()).abs().max() <= 1e-3 * tensor.double().abs().max(), key
    for line, other in zip(*(read_lines(r / "metrics.jsonl") for r in (run, expected)), strict=True):
        assert line.keys() == other.keys()
        names = line.keys() - {"seconds", "sa", "ra"}
        assert len(names) == terms and all(line[name] == pytest.approx(other[name], rel=1e-3) for name in names)
    assert {path.name for path in run.iterdir()} == {path.name for path in expected.iterdir()}


def broken_off(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets journals stop as if killed in the middle of a line, once they have written `after` lines."""
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
