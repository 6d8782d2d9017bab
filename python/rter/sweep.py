"""Methods, or parts of the recipe, compared over several seeds."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rter.checkpoint import read_report, run_config, write_atomic, write_json
from rter.config import Config
from rter.errors import UserError
from rter.evaluate import evaluate
from rter.methods import METHODS
from rter.report import summary, table
from rter.train import train

ROWS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS},
    "nine-experts": {"method": "nine-experts", "num_experts": 9, "gate": "soft"},
    "dense pgd-at": {"method": "pgd-at", "num_experts": 1},
}
ABLATION: dict[str, dict[str, Any]] = {
    "rt-er": {"method": "rt-er"},
    "without clean CE": {"method": "rt-er", "clean_weight": 0.0},
    "without KL": {"method": "rt-er", "beta": 0.0},
    "without balance": {"method": "rt-er", "balance_weight": 0.0},
    "without exploring": {"method": "rt-er", "explore": 0.0},
    "softmax gate": {"method": "rt-er", "gate": "softmax"},
}
EQUAL_TIME = ("pgd-at", "dense pgd-at")


def sweep(
    out: Path,
    seeds: Sequence[int],
    settings: dict[str, Any],
    rows: Mapping[str, dict[str, Any]],
    steps: int,
    restarts: int,
    suite: str,
    equal_time: bool = False,
) -> Path:
    """Trains and evaluates each row with each seed in a folder of its own; returns the path of the Markdown table.

    `rows` are ABLATION, or some of ROWS. With `equal_time`, those in EQUAL_TIME are trained once more, for as many
    epochs as fit into the time that RT-ER took here.

    A finished run is taken as it is and a stopped one goes on, so a sweep that was stopped goes on, and the ablation in
    the same folder shares the first row.
    """
    out.mkdir(parents=True, exist_ok=True)

    def finish(name: str, row: dict[str, Any]) -> list[dict[str, Any]]:
        configs = [Config(**(settings | row | {"seed": seed})) for seed in seeds]
        return [_finish(out / f"{name.replace(' ', '-')}-{c.seed}", c, steps, restarts, suite) for c in configs]

    reports = {name: finish(name, row) for name, row in rows.items()}
    for name in EQUAL_TIME if equal_time else ():
        if {name, "rt-er"} <= rows.keys():
            epochs = round(reports["rt-er"][0]["epochs"] * _seconds(reports["rt-er"]) / _seconds(reports[name]))
            reports[f"{name} {epochs} epochs"] = finish(f"{name} equal time", rows[name] | {"epochs": epochs})
    figures = {name: _statistics([summary(report) for report in runs]) for name, runs in reports.items()}
    file = out / ("ablation" if rows is ABLATION else "methods")
    write_json(file.with_suffix(".json"), {"seeds": list(seeds), "rows": figures})
    text = {name: {key: _text(key, value) for key, value in row.items()} for name, row in figures.items()}
    write_atomic(
        file.with_suffix(".md"), f"Mean and deviation over seeds {', '.join(map(str, seeds))}.\n\n{table(text)}\n"
    )
    return file.with_suffix(".md")


def _finish(run: Path, config: Config, steps: int, restarts: int, suite: str) -> dict[str, Any]:
    if (run / "report.json").exists():
        report = read_report(run)
        attack = report["attack"]["steps"], report["attack"]["restarts"], report["suite"]
        if run_config(run) != config or attack != (steps, restarts, suite):
            raise UserError(f"--out holds {run} with other settings: give another folder, or remove it first")
        return report
    train(config, run, resume=True)
    return evaluate(run, "last", steps, restarts, suite)


def _seconds(reports: Sequence[dict[str, Any]]) -> float:
    return statistics.mean(report["train_seconds"] for report in reports)


def _statistics(rows: Sequence[dict[str, float | None]]) -> dict[str, dict[str, float] | None]:
    """Mean and standard deviation of each figure over the seeds; None where it is not measured."""
    result: dict[str, dict[str, float] | None] = {}
    for key in rows[0]:
        values = [value for row in rows if (value := row[key]) is not None]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        result[key] = {"mean": statistics.mean(values), "deviation": deviation} if values else None
    return result


def _text(key: str, value: dict[str, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value['mean']:.0f}" if key == "train s" else f"{value['mean']:.3f} ± {value['deviation']:.3f}"
