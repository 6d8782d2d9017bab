"""report.md: the figures of an evaluated run beside its baselines, with plots."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rter import plots
from rter.checkpoint import load_tensors, read_lines, read_report, write_atomic, write_json
from rter.data.files import damaged
from rter.errors import UserError

EXAMPLES = {"x", "x_adv", "label", "clean", "adversarial"}
COLUMNS = {
    "SA": "accuracy on clean images",
    "RA": "accuracy under PGD on the whole model",
    "AA": "accuracy under AutoAttack's standard ensemble (full suite)",
    "verdict": "part of the images that withstand every attack of the suite",
    "RA-E": "accuracy of one expert alone under PGD on it: mean, least and greatest over the experts",
    "RA-R": "accuracy under PGD on the router's choice",
    "load": "least part of the clean images that an expert gets",
    "train s": "seconds of training, without the measurements on held-out images",
}


def summary(report: dict[str, Any]) -> dict[str, float | None]:
    """The figures of one run that tables show."""
    return {
        "SA": report["sa"],
        "RA": report["ra"],
        "AA": report["aa"],
        "verdict": report["verdict"],
        "RA-E mean": sum(report["ra_e"]) / len(report["ra_e"]) if report["ra_e"] else None,
        "RA-E min": min(report["ra_e"], default=None),
        "RA-E max": max(report["ra_e"], default=None),
        "RA-R": report["ra_r"],
        "min load": min(report["expert_load"], default=None),
        "train s": report["train_seconds"],
    }


def table(rows: dict[str, dict[str, Any]], first: str = "run") -> str:
    """A Markdown table of aligned columns; floats to three places, seconds to none, None as a dash."""

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


def verdict(report: dict[str, Any]) -> str:
    """The line that an evaluation comes to."""
    low, high = report["intervals"]["verdict"]
    worst = report["worst_attack"]
    failed = [name for name, check in report["checks"].items() if not check["passed"]]
    return (
        f"Verdict: {report['verdict']:.1%} of the images withstand every attack of the {report['suite']} suite "
        f"(95 % interval {low:.1%} to {high:.1%}); PGD alone leaves {report['ra']:.1%}"
        + (f", AutoAttack alone {report['aa']:.1%}" if report["aa"] is not None else "")
        + (f", and most of what PGD leaves falls to {worst}. " if worst != "pgd" else ". ")
        + (f"Checks that failed: {'; '.join(failed)}." if failed else "All checks passed.")
    )


def measured_on(report: dict[str, Any]) -> str:
    """Which images the figures are of."""
    sample = report.get("sample")  # reports from before there were samples have none
    if not sample:
        return f"{report['held_out']} {report['split']} images"
    return (
        f"{report['held_out']} of the {sample['of']} {report['split']} images, drawn by seed {sample['seed']} in the "
        "proportions of the classes,"
    )


def name_of(run: Path) -> str:
    """The name of a run's folder, in which the locale cannot hide letters."""
    return os.fsencode(run.resolve().name).decode("utf-8", "replace")


def make_report(run: Path, baselines: Sequence[Path]) -> str:
    """Writes report.md and its plots, puts the baselines into report.json; returns the table of figures."""
    report = read_report(run)
    name = name_of(run)
    if baselines:
        report["baselines"] = {name_of(path): read_report(path) | {"baselines": {}} for path in baselines}
        if len({name, *report["baselines"]}) <= len(baselines):
            raise UserError(
                f"RUN and --baselines must be folders of different names, got {name!r} among or beside them"
            )
        write_json(run / "report.json", report)
    figures = table({name: summary(report), **{n: summary(b) for n, b in report["baselines"].items()}})
    examples = load_tensors(run / "examples.safetensors")
    if lacking := EXAMPLES - examples.keys():
        raise damaged(run / "examples.safetensors", f"it holds no {', '.join(sorted(lacking))}")
    metrics = run / "metrics.jsonl"  # which only runs of `rter train` have
    plots.draw(run / "plots", name, report, read_lines(metrics) if metrics.exists() else [], examples)
    write_atomic(run / "report.md", _text(name, report, figures))
    return figures


def _text(name: str, report: dict[str, Any], figures: str) -> str:
    attack = report["attack"]
    parts = [
        f"# {name}: {report['method']} on {report['data']}",
        f"{report['num_experts'] or 'No'} expert(s), "
        + (f"{report['epochs']} epochs, " if report["epochs"] else "")
        + f"{report['norm']} perturbations of radius {report['eps']:.4g}, seed {report['seed']}. "
        f"Measured on {measured_on(report)}"
        + (f" with the {report['weights']} weights" if report["weights"] in ("last", "best") else "")
        + f": PGD of {attack['steps']} steps of {attack['alpha_ratio']:.3g} eps, "
        f"{attack['restarts']} restart(s) on the whole model. The standard error of an accuracy near 0.7 is "
        f"{(0.21 / report['held_out']) ** 0.5:.3f}.",
        f"**{verdict(report)}**",
        figures,
        "\n".join(f"- **{column}**: {meaning}" for column, meaning in COLUMNS.items()),
        "![Accuracy against eps](plots/accuracy.png)",
        *(["![Learning curves](plots/learning.png)"] if report["epochs"] else []),
        *_evaluation(report),
    ]
    if report["num_experts"] > 1:
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
        "Images that are misread as they are, or broken by an attack, are not attacked again. Only PGD, AutoAttack and "
        "the attacks on an expert or the router are tried on all that are read rightly, for a figure of their own. "
        "New: broken by no attack before. Left: part of all images.",
        *([table(attacks, "attack")] if attacks else []),
        "## 95 % intervals, by Wilson, over the images",
        table(intervals, "figure"),
        "## Checks of the evaluation",
        table(checks, "check"),
        *(f"AutoAttack warned: {flag}" for flag in report["aa_flags"] or ()),
    ]
    if report["route_radius"]:
        parts.append(
            f"The router is affine: half of the images provably keep their expert within "
            f"{report['route_radius']['median']:.3g}, and {report['route_radius']['certified']:.1%} do within "
            f"{report['eps']:.3g}."
        )
    if report["certificate"]:
        certificate = report["certificate"]
        reach = certificate["greatest_radius"]
        gates, experts = (
            ", ".join(f"{value:.3g}" for value in certificate[name]) for name in ("gate_lipschitz", "expert_lipschitz")
        )
        parts.append(
            "The certificate of the RT-ER paper (theorem 5.4), taken for the soft mixture of the experts' softmax "
            f"(so M = {certificate['expert_bound']:g}) and with Lipschitz constants r = {gates} of the gates and L = "
            f"{experts} of the experts, from the norms of their layers, reaches {reach:.2g} at most: "
            f"{'nothing' if reach < report['eps'] else 'a part'} is proved at {report['eps']:.3g}."
        )
    return parts
