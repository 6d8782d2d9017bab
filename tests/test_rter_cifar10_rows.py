"""The runs of docs/configs/cifar10-*.toml have the same schedule and attack, and differ only in what they compare."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rter.data.split import Data, Split
from rter.models.build import build_model
from rter.settings import load_config

ROOT = Path(__file__).parents[1]
CONFIGS, RESULTS = ROOT / "docs" / "configs", ROOT / "benchmarks" / "results" / "cifar10"
FILES = sorted(file for file in RESULTS.rglob("config.json") if file.parent.name != "dual")  # which was not trained
PAPER: dict[str, Any] = {
    "gate": "softmax", "second": "ranked", "beta": 6.0, "clean_weight": 0.0, "balance_weight": 0.0, "explore": 0.0,
}  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "dense-16": {"method": "fast-at", "num_experts": 1},
    "dense-24": {"method": "fast-at", "num_experts": 1, "width": 24},
    "dense-32": {"method": "fast-at", "num_experts": 1, "width": 32},
    "standard": {"method": "standard", "train_attack": "pgd"},  # which it does not use
    "at-moe": {"method": "fast-at"},
    "rt-er": {"method": "rt-er"},
    "rt-er-paper": {"method": "rt-er", **PAPER},
    "upcycled": {"method": "fast-at", "shared_stages": 3, "router": "pooled", "upcycle": 0.5, "explore": 0},
    "condconv": {"method": "fast-at", "num_experts": 1, "kernels": 4},
}
SAME = {
    "data": "cifar10", "model": "resnet18", "width": 16, "num_experts": 4, "eps": 8 / 255, "norm": "Linf",
    "train_attack": "n-fgsm", "augment": "flip,translate4", "optimizer": "sgd", "schedule": "one-cycle", "lr": 0.2,
    "weight_decay": 5e-4, "momentum": 0.9, "batch_size": 128, "ema": 0.999, "label_smoothing": 0, "epochs": 10,
    "held_out": 500, "eval_every": 1, "seed": 0, "train_images": 0, "clip_norm": 0, "amp": "none", "awp_gamma": 0,
    "shared_stages": 0, "route_weight": 0, "router": "linear", "upcycle": 0, "kernels": 1,
}  # fmt: skip


def test_every_row_is_known() -> None:
    assert {path.stem for path in CONFIGS.glob("cifar10-*.toml")} == {f"cifar10-{row}" for row in ROWS}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_the_run_it_is_meant_to_be(row: str) -> None:
    config = dataclasses.asdict(load_config(CONFIGS / f"cifar10-{row}.toml"))
    expected = SAME | ROWS[row]
    assert {name: config[name] for name in expected} == expected


def test_rows_differ_only_in_what_they_compare() -> None:
    first, *others = (dataclasses.asdict(load_config(CONFIGS / f"cifar10-{row}.toml")) for row in ROWS)
    differ = {name for other in others for name in first if first[name] != other[name]}
    compared = {"method", "train_attack", "num_experts", "width", "shared_stages", "router", "upcycle", "kernels"}
    assert differ == {*compared, *PAPER}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.parent.relative_to(RESULTS)))
def test_a_row_was_made_by_its_file(file: Path) -> None:
    """But for the seed and what changes no bit; and it holds nothing but settings, such as a path of its machine."""
    made, row = json.loads(file.read_text()), file.parent.name
    stated = dataclasses.asdict(load_config(CONFIGS / f"cifar10-{row}.toml"))
    assert made.keys() <= stated.keys()
    assert {name for name, value in made.items() if value != stated[name]} <= {"seed", "recompute"}


def test_dense_rows_have_an_experts_width_and_a_mixtures_parameters() -> None:
    images = Split(torch.rand(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64))
    sizes = {}
    for row in ("dense-16", "dense-32", "rt-er"):
        model = build_model(load_config(CONFIGS / f"cifar10-{row}.toml"), Data(images, images, 10))
        sizes[row] = sum(weight.numel() for weight in model.moe.experts.parameters())
    assert sizes["rt-er"] == 4 * sizes["dense-16"] and abs(sizes["dense-32"] / sizes["rt-er"] - 1) < 0.01
    assert 2 * max(sizes.values()) < 6e6  # bytes in fp16


def test_the_page_and_the_json_repeat_the_evaluations(tmp_path: Path) -> None:
    out, curves = tmp_path / "rows.json", tmp_path / "curves.svg"
    words = ["benchmarks/cifar10.py", "benchmarks/results/cifar10", str(out), str(curves)]
    said = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs/cifar10.md").read_text()
    tables = [part for part in said.strip().split("\n\n") if part.startswith("|")]
    assert len(tables) >= 2 and not [table for table in tables if table not in page]
    assert sum(line.startswith("| dense-16 ") for line in page.splitlines()) == 1
    assert json.loads(out.read_text()) == json.loads((ROOT / "benchmarks/results/cpu/cifar10.json").read_text())
    for picture in (curves, ROOT / "docs/images/cifar10.svg"):
        drawn = set(re.findall(r'<g id="([a-z0-9-]+)-(?:sa|ra)"', picture.read_text()))
        assert drawn == {path.parent.name for path in (ROOT / "benchmarks/results/cifar10").glob("*/metrics.jsonl")}


def test_the_readme_repeats_rows() -> None:
    readme, rows = (
        (ROOT / "README.md").read_text(),
        json.loads((ROOT / "benchmarks/results/cpu/cifar10.json").read_text()),
    )
    names = {
        "one dense network |": "dense-16",
        "one dense network that": "dense-24",
        "RT-ER, one of four": "rt-er",
        "one network whose": "condconv",
    }
    for said, name in names.items():
        figures = [rows["rows"][name][key] for key in ("sa", "ra", "aa", "verdict")]
        expected = [f"{100 * figure[0]:.1f}" if figure else "not measured" for figure in figures]
        (line,) = [line for line in readme.splitlines() if line.startswith(f"| {said}")]
        assert line.strip("| ").split(" | ")[1:] == expected
