"""Collects the rows of docs/cifar10.md, and prints their tables; run it with python/ on the PYTHONPATH:

python benchmarks/cifar10.py benchmarks/results/cifar10 benchmarks/results/cpu/cifar10.json docs/images/cifar10.svg

Each folder in the first is a row: an export of a run of `rter train`, and in its folders pgd and full, if they are
there, what `rter evaluate` wrote in that suite. The dual model, which was not trained, has no metrics.jsonl.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
from rter import plots
from rter.checkpoint import read_json, read_lines, read_report, write_json
from rter.paired import differences
from rter.report import table

matplotlib.use("svg")
from matplotlib import pyplot as plt

ROWS = (
    "dense-16",
    "dense-24",
    "dense-32",
    "standard",
    "at-moe",
    "rt-er",
    "rt-er-paper",
    "dual",
    "upcycled",
    "condconv",
)  # docs/configs and an export
SETTINGS = ("method", "train_attack", "num_experts", "width", "shared_stages", "kernels", "epochs")
FIRST = "dense-16"


def row(folder: Path) -> dict[str, Any]:
    """The figures of a row; None for what was not measured."""
    config, metrics = read_json(folder / "config.json", {}), folder / "metrics.jsonl"
    history = read_lines(metrics) if metrics.exists() else []
    reports = {suite: read_report(folder / suite) for suite in ("pgd", "full") if (folder / suite).exists()}
    figures = {key: config[key] for key in SETTINGS if key in config}
    figures["seconds"] = history[-1]["seconds"] if history else None  # of the wall clock
    for suite, keys in {"pgd": ("sa", "ra"), "full": ("aa", "verdict")}.items():
        report = reports.get(suite)
        figures |= {key: report and [report[key], *report["intervals"][key]] for key in keys}
        figures[f"{suite}_images"] = report and report["held_out"]
    figures["expert_load"] = next(iter(reports.values()), {}).get("expert_load")
    figures["attack_results"] = reports.get("full", {}).get("attack_results")
    return figures


def paired(folders: dict[str, Path], suite: str) -> dict[str, dict[str, str | None]]:
    """Each row's figures minus those of the first, image by image, with 95 % intervals."""
    there = {name: folder / suite for name, folder in folders.items() if (folder / suite).exists()}
    reports = {name: read_report(folder) for name, folder in there.items()}
    found = {}
    for name in [name for name in there if name != FIRST and FIRST in there]:
        pair = (name, FIRST)
        rows, unpaired = differences({n: there[n] for n in pair}, {n: reports[n] for n in pair})
        if rows:
            found[name] = rows[FIRST]
        for reason in unpaired:
            print(f"{suite}: {reason}", file=sys.stderr)
    return found


def percent(figure: list[float] | None) -> str:
    if figure is None:
        return "not measured"
    return "{:.1f} ({:.1f} to {:.1f})".format(*(100 * value for value in figure))


def draw(folders: dict[str, Path], file: Path) -> None:
    """Held-out accuracies of each row over its epochs: clean, and under PGD-10."""
    style = plots.STYLE | {"svg.hashsalt": "", "svg.fonttype": "path"}
    with plt.rc_context(style):
        figure, both = plt.subplots(1, 2, figsize=(8, 3.2), sharex=True)
        for (name, folder), line in zip(folders.items(), plots.lines((plots.INK, *plots.RUNS)), strict=False):
            history = read_lines(folder / "metrics.jsonl")
            for axes, key in zip(both, ("sa", "ra"), strict=True):
                points = [(record["epoch"], 100 * record[key]) for record in history]
                axes.plot(
                    *zip(*points, strict=True),
                    "o",
                    **line,
                    markersize=3,
                    linewidth=1.5,
                    label=name,
                    gid=f"{name}-{key}",
                )
        for axes, title in zip(both, ("clean", "under PGD-10"), strict=True):
            axes.set(title=f"Held-out accuracy, {title}, %", xlabel="epoch", ylim=(0, None))
        both[0].legend(ncols=2, fontsize=8)
        figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="whose folders are the rows")
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("curves", type=Path, help="SVG file to write")
    options = parser.parse_args()
    folders = {name: options.folder / name for name in ROWS if (options.folder / name).exists()}
    rows = {name: row(folder) for name, folder in folders.items()}
    print(
        table(
            {
                name: {
                    "clean, %": percent(r["sa"]),
                    "PGD-50, %": percent(r["ra"]),
                    "AutoAttack, %": percent(r["aa"]),
                    "every attack, %": percent(r["verdict"]),
                    "least load": f"{min(r['expert_load']):.2f}" if r["num_experts"] > 1 and r["expert_load"] else "",
                }
                for name, r in rows.items()
            },
            "row",
        )
    )
    found = {suite: paired(folders, suite) for suite in ("pgd", "full")}
    for suite, differ in found.items():
        if differ:
            dull = {"pgd": "verdict"}.get(suite)  # it is RA
            kept = {name: {k: v for k, v in r.items() if v is not None and k != dull} for name, r in differ.items()}
            print(f"\n{suite}: each row minus {FIRST}\n\n{table(kept, 'row')}")
    draw({name: folder for name, folder in folders.items() if rows[name]["seconds"]}, options.curves)
    write_json(options.out, {"rows": rows, "minus_dense": found})


if __name__ == "__main__":
    main()
