"""Differences between evaluations of the same images, paired image by image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rter.checkpoint import load_tensors
from rter.intervals import paired

FIGURES = {"SA": "sa", "RA": "ra", "AA": "aa", "verdict": "verdict"}
ALIKE = {"images": "other images", "norm": "another norm", "eps": "another eps", "suite": "another suite",
         "attack": "another PGD"}  # fmt: skip
HEADING = "minus the row, image by image: the difference, and in brackets its 95 % interval (Agresti and Min 2005)."


def differences(
    folders: Mapping[str, Path], reports: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, dict[str, str | None]], Sequence[str]]:
    """The first run's figures minus those of every other run that was evaluated on the same images in the same way.

    Returns:
        A row for each such run, and a line for each that cannot be paired, which says why.
    """
    first, *others = folders
    rows: dict[str, dict[str, str | None]] = {}
    unpaired = []
    for name in others:
        unlike = [what for key, what in ALIKE.items() if reports[name].get(key) != reports[first].get(key)]
        if any(not (folders[run] / "outcomes.safetensors").exists() for run in (first, name)):
            unlike = ["an evaluation that kept no outcomes of single images"]
        if unlike:
            unpaired.append(f"{name} is not paired with {first}: {unlike[0]}")
        else:
            ours, theirs = (load_tensors(folders[run] / "outcomes.safetensors") for run in (first, name))
            rows[name] = {
                figure: _difference(ours[key].tolist(), theirs[key].tolist()) if key in ours and key in theirs else None
                for figure, key in FIGURES.items()
            }
    return rows, unpaired


def _difference(ours: list[bool], theirs: list[bool]) -> str:
    pairs = list(zip(ours, theirs, strict=True))
    difference, low, high = paired(pairs.count((True, False)), pairs.count((False, True)), len(pairs))
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"
