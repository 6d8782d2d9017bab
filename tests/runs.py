"""What tests of several files ask of the folder of a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rter.checkpoint import load_tensors, read_lines
from rter.journal import Journal


def assert_same_run(run: Path, expected: Path) -> None:
    """Bit for bit the same weights and metrics, but for the seconds, and the same files."""
    for name in ("last.safetensors", "best.safetensors"):
        tensors, others = load_tensors(run / name), load_tensors(expected / name)
        assert tensors.keys() == others.keys() and all(torch.equal(tensors[key], others[key]) for key in tensors)
    lines, others = ([{**line, "seconds": 0} for line in read_lines(r / "metrics.jsonl")] for r in (run, expected))
    assert lines == others
    assert (run / "metrics.csv").read_text().count("\n") == len(lines) + 1
    assert {path.name for path in run.iterdir()} == {path.name for path in expected.iterdir()}


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
