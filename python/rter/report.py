"""report.md: the figures of an evaluated run and its baselines, with plots."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rter import plots
from rter.checkpoint import load_tensors, read_lines, read_report, write_atomic, write_json
from rter.data.files import damaged
from rter.errors import UserError
from rter.page import make_page
from rter.paired import HEADING, differences
from rter.wording import COLUMNS, certificate, counted, distance, measured_on, summary, verdict, weights_of

EXAMPLES = {"x", "x_adv", "label", "clean", "adversarial"}


def table(rows: dict[str, dict[str, Any]], first: str = "run") -> str:
    """A Markdown table with aligned columns; floats have three decimals, seconds none, None is a dash."""

    def cell(name: str, value: Any) -> str:
        if value is None:
            return "-"
        return str(value) if isinstance(value, (str, int)) else f"{value:.0f}" if name == "train s" else f"{value:.3f}"

    names = list(next(iter(rows.values())))
    lines = [[first, *names], *([row, *(cell(n, values[n]) for n in names)] for row, values in rows.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in [lines[0], rule, *lines[1:]]
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def name_of(run: Path) -> str:
    """The name of a run's folder, with letters outside ASCII whatever the locale."""
    return os.fsencode(run.resolve().name).decode("utf-8", "replace")


def make_report(run: Path, baselines: Sequence[Path]) -> str:
    """Writes report.html, and report.md with plots; puts baselines into report.json; returns the table of figures."""
    report = read_report(run)
    name = name_of(run)
    if baselines:
        report["baselines"] = {name_of(path): read_report(path) | {"baselines": {}} for path in baselines}
        if len({name, *report["baselines"]}) <= len(baselines):
            folders = ", ".join(map(str, (run, *baselines)))
            raise UserError(f"RUN and --baselines must be folders of different names, got {folders}")
        write_json(run / "report.json", report)
    figures = table({name: summary(report), **{n: summary(b) for n, b in report["baselines"].items()}})
    examples = _examples(run)
    history = _history(run)
    plots.draw(run / "plots", name, report, history, examples)
    write_atomic(run / "report.md", _text(name, report, figures))
    runs = {name: report, **report["baselines"]}
    write_atomic(run / "report.html", make_page(runs, {name: history}, {name: examples}, {name: run}))
    return figures


def compare(runs: Sequence[Path], file: Path) -> str:
    """Writes a page of several runs; returns the table of their figures, and how the first differs from the others."""
    names = [name_of(run) for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"RUN must be folders of different names, got {', '.join(map(str, runs))}")
    reports = {name: read_report(run) for name, run in zip(names, runs, strict=True)}
    folders = dict(zip(names, runs, strict=True))
    paired, unpaired = differences(folders, reports)
    histories = {name: _history(run) for name, run in folders.items()}
    write_atomic(
        file, make_page(reports, histories, {n: _examples(run) for n, run in folders.items()}, folders, paired)
    )
    parts = [table({name: summary(report) for name, report in reports.items()})]
    if paired:
        parts += [f"{names[0]} {HEADING}", table(paired)]
    return "\n\n".join([*parts, *unpaired])


def _history(run: Path) -> list[dict[str, Any]]:
    """The epochs of a run; the evaluation of a model that is not from a run has none."""
    return read_lines(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []


def _examples(run: Path) -> dict[str, Tensor]:
    examples = load_tensors(run / "examples.safetensors")
    if lacking := EXAMPLES - examples.keys():
        raise damaged(run / "examples.safetensors", f"it holds no {', '.join(sorted(lacking))}")
    return examples


def _text(name: str, report: dict[str, Any], figures: str) -> str:
    attack = report["attack"]
    parts = [
        f"# {name}: {report['method']} on {report['data']}",
        f"{counted(report['num_experts'], 'expert').capitalize()}, "
        + (f"{counted(report['epochs'], 'epoch')}, " if report["epochs"] else "")
        + f"{report['norm']} perturbations of radius {distance(report['eps'])}, seed {report['seed']}. "
        f"Measured on {measured_on(report)}"
        + weights_of(report)
        + f": PGD of {attack['steps']} steps of {attack['alpha_ratio']:.3g} eps, "
        f"{counted(attack['restarts'], 'restart')} on the whole model. The standard error of an accuracy near 0.7 is "
        f"{(0.21 / report['held_out']) ** 0.5:.3f}.",
        f"**{verdict(report)}**",
        figures,
        "\n".join(f"- **{column}**: {meaning}" for column, meaning in COLUMNS.items()),
        "![Accuracy against eps](plots/accuracy.png)",
        *(["![Learning curves](plots/learning.png)"] if report["epochs"] else []),
        *_evaluation(report),
    ]
    if report["ra_e"] and report["num_experts"] > 1:
        parts += [
            "![Load and robustness of each expert](plots/experts.png)",
            f"Under the attack on the whole model {report['route_flip_rate_whole']:.1%} of the images change expert, "
            f"under the attack on the router {report['route_flip_rate']:.1%}.",
        ]
    if "alpha_curve" in report:
        curve = report["alpha_curve"]
        points = {f"alpha {alpha}": dict(zip(("SA", "RA", "above"), p, strict=True)) for alpha, *p in curve["points"]}
        parts.append(
            "(1 - alpha) F_S + alpha F_R, each image under the worst of all the attacks. Above: distance from "
            "the line between the two ends, positive for more SA at the same RA. Between the ends it is "
            f"{curve['least']:.4f} to {curve['above']:.4f}; without any clean error and as robust as the better end it "
            f"would be {curve['greatest']:.4f}.\n\n{table(points)}"
        )
    parts.append("![Clean and adversarial images](plots/images.png)")
    return "\n\n".join(parts) + "\n"


def _evaluation(report: dict[str, Any]) -> list[str]:
    """Every attack by itself, intervals, certificates, checks and flags."""
    attacks = {
        each["name"]: {
            "tried on": each["attacked"],
            "broke": each["broken"],
            "new": each["new"],
            "left": each["accuracy"],
        }
        for each in report.get("attack_results", [])  # reports from before broken images were left alone have none
    }
    names = {"sa": "SA", "ra": "RA", "aa": "AA", "verdict": "verdict"}
    intervals = {names[n]: {"accuracy": report[n], "from": a, "to": b} for n, (a, b) in report["intervals"].items()}
    checks = {
        n: {"passed": "yes" if c["passed"] else "**no**", "value": c["value"]} for n, c in report["checks"].items()
    }
    parts = [
        "## What each attack did",
        "Images that are misclassified without an attack, or broken by one, are not attacked again. Only PGD, "
        "AutoAttack and the attacks on an expert or the router, which give figures of their own, are tried on all that "
        "are classified correctly. New: not broken by an earlier attack. Left: as a fraction of all images.",
        *([table(attacks, "attack")] if attacks else []),
        "## 95 % intervals over the images (Wilson)",
        table(intervals, "figure"),
        "## Checks of the evaluation",
        table(checks, "check"),
        *(f"AutoAttack warned: {flag}" for flag in report["aa_flags"] or ()),
    ]
    if proved := certificate(report):
        parts.append(proved)
    return parts
