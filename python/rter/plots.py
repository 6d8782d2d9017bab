"""The figures of a report, in one style: colour-blind-safe (Okabe and Ito), light grid, no frame."""

from collections.abc import Iterator, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from rter.intervals import wilson
from rter.wording import distance

matplotlib.use("Agg")

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, GREY = "#3A3F47", "#8A8F98"
CLEAN, ATTACKED = BLUE, RED
RUNS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
TERMS = (ORANGE, PURPLE, SKY, GREEN, BLUE, RED)
NORMS = {"Linf": r"$L_\infty$", "L2": r"$L_2$", "L1": r"$L_1$"}
DASHED = {"color": GREY, "linewidth": 1, "linestyle": (0, (4, 3))}
STYLE: dict[Any, Any] = {
    "figure.dpi": 160,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#B8BDC6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E7E9ED",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
}


def draw(
    folder: Path, name: str, report: dict[str, Any], history: list[dict[str, Any]], examples: dict[str, Tensor]
) -> None:
    """Writes accuracy.png, images.png, learning.png (if there was an epoch) and experts.png (if there are several)."""
    folder.mkdir(exist_ok=True)
    figures = {
        "accuracy": lambda: accuracy({name: report, **report["baselines"]}, report),
        "images": lambda: images(report, examples),
    }
    if history:
        figures["learning"] = lambda: learning(history)
    if report["ra_e"] and report["num_experts"] > 1:
        figures["experts"] = lambda: experts(report)
    with plt.rc_context(STYLE):
        for file, figure in figures.items():
            drawn = figure()
            drawn.savefig(folder / f"{file}.png", facecolor="white")
            plt.close(drawn)


def draw_comparison(file: Path, rows: dict[str, dict[str, list[float | None]]]) -> None:
    """Draws the figures of a sweep's rows, each a list with one value per seed."""
    with plt.rc_context(STYLE):
        drawn = comparison(rows)
        drawn.savefig(file, facecolor="white")
        plt.close(drawn)


def comparison(rows: dict[str, dict[str, list[float | None]]]) -> Figure:
    """SA, RA, AA and verdict of each row: the mean, with a small dot for each seed; the best verdict on top."""
    values = {name: {key: np.array(row[key], float) for key in row} for name, row in rows.items()}  # None is NaN
    names = sorted(values, key=lambda name: values[name]["verdict"].mean())
    figure, axes = plt.subplots(figsize=(6.4, 0.8 + 0.42 * len(names)))
    for i, (key, colour) in enumerate((("SA", CLEAN), ("RA", ORANGE), ("AA", GREEN), ("verdict", ATTACKED))):
        at = np.arange(len(names)) + 0.12 * (1.5 - i)
        seeds = np.array([values[name][key] for name in names])  # [rows, seeds]
        axes.plot(seeds, at, "o", color=colour, markersize=2.5, alpha=0.5, zorder=2)
        axes.plot(seeds.mean(1), at, "D", color=colour, markersize=5, label=key, clip_on=False, zorder=3)
    axes.set(xlim=(0, 1), ylim=(-0.6, len(names) - 0.4))
    axes.set_yticks(range(len(names)), names)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
    return figure


def lines(colours: Sequence[str]) -> Iterator[dict[str, Any]]:
    """How to draw one line after another: in each colour, then dashed, dotted and dash-dotted, and all over again."""
    return cycle({"color": colour, "linestyle": style} for style, colour in product(("-", "--", ":", "-."), colours))


def accuracy(runs: dict[str, dict[str, Any]], report: dict[str, Any]) -> Figure:
    """Accuracy against eps, of the run and its baselines, with one standard error to either side."""
    figure, axes = plt.subplots(figsize=(5.6, 3.4))
    axes.axvline(report["eps"], **DASHED)  # type: ignore[arg-type]
    axes.annotate(
        f"eps {distance(report['eps'])}",
        (report["eps"], 1),
        xycoords=("data", "axes fraction"),
        xytext=(5, -3),
        textcoords="offset points",
        color=GREY,
        va="top",
    )
    for (name, run), line in zip(runs.items(), lines(RUNS), strict=False):
        eps, values = np.array(run["eps_curve"]).T
        low, high = np.array([wilson(value, run["held_out"], z=1) for value in values]).T
        axes.fill_between(eps, low, high, color=line["color"], alpha=0.15, linewidth=0)
        axes.plot(eps, values, "o", **line, markersize=4, clip_on=False, label=name, zorder=3)
    axes.set(
        title="Accuracy under attack", xlabel=f"radius of the {NORMS[report['norm']]} perturbation", xlim=(0, None)
    )
    _percent(axes)
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.92))
    return figure


def learning(history: list[dict[str, Any]]) -> Figure:
    """Held-out accuracies and the terms of the loss over the epochs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2))
    epochs = [record["epoch"] for record in history]
    for key, colour, label in (("sa", CLEAN, "clean"), ("ra", ATTACKED, "under the training attack")):
        points = [(record["epoch"], record[key]) for record in history if key in record]
        left.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, clip_on=False, label=label, zorder=3)
    left.set(title="Held-out accuracy")
    _percent(left)
    left.legend(loc="lower right")
    names = dict.fromkeys(name for record in history for name in record)  # phases of training may have different terms
    terms = [name for name in names if name not in ("epoch", "loss", "seconds", "sa", "ra", "collapsed")]
    right.plot(epochs, [record["loss"] for record in history], color=INK, label="loss")
    for name, line in zip(terms, lines(TERMS), strict=False):
        points = [(record["epoch"], record[name]) for record in history if name in record]
        right.plot(*zip(*points, strict=True), **line, linewidth=1.5, label=name.replace("_", " "))
    right.set(title="Training loss and its terms", ylim=(0, None))
    right.legend()
    for axes in (left, right):
        axes.set(xlabel="epoch", xlim=(0, epochs[-1]))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def experts(report: dict[str, Any]) -> Figure:
    """The fraction of images that each expert gets, clean and under attack, and its robust accuracy alone."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), width_ratios=(3, 2))
    at = np.arange(report["num_experts"])
    left.axhline(1 / report["num_experts"], **DASHED)
    _bars(left, at - 0.19, report["expert_load"], 0.36, CLEAN, "clean")
    _bars(left, at + 0.19, report["expert_load_adversarial"], 0.36, ATTACKED, "under attack")
    left.set(title="Load of each expert", ylim=(0, 1.12 * left.get_ylim()[1]))
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    left.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
    _bars(right, at, report["ra_e"], 0.6, ATTACKED, "")
    right.set(title="Accuracy alone, under attack")
    _percent(right)
    for axes in (left, right):
        axes.set_xticks(at, [f"expert {e}" if len(at) <= 4 else str(e) for e in at])
        axes.grid(axis="x", visible=False)
    return figure


def images(report: dict[str, Any], examples: dict[str, Tensor]) -> Figure:
    """One image of each class, the perturbation, and the adversarial image, with the model's predictions."""
    count, names = len(examples["label"]), report.get("classes") or []
    short = max(map(len, names), default=99) <= 12
    figure, grid = plt.subplots(3, count, figsize=(0.82 * count, 3.15), squeeze=False)
    delta = examples["x_adv"] - examples["x"]
    rows = (
        ("clean", examples["x"], examples["clean"]),
        ("difference", 0.5 + 0.35 * delta / (delta.abs().max().clamp(min=1e-9)), None),
        ("adversarial", examples["x_adv"], examples["adversarial"]),
    )
    for row, (title, pixels, predictions) in zip(grid, rows, strict=True):
        for i, axes in enumerate(row):
            image = pixels[i].permute(1, 2, 0).squeeze(-1).numpy()
            axes.imshow(image, cmap="gray_r" if predictions is not None else "PuOr_r", vmin=0, vmax=1)
            axes.grid(False)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color="#B8BDC6")
            if predictions is not None:
                right = bool(predictions[i] == examples["label"][i])
                axes.spines[:].set(color=CLEAN if right else ATTACKED, linewidth=1.6)
                number = int(predictions[i])
                said = names[number] if short and number < len(names) else number
                mark, colour = ("✓", CLEAN) if right else ("✗", ATTACKED)
                axes.set_xlabel(
                    f"{said} {mark}", color=colour, labelpad=2, fontsize=7 if short else 9, parse_math=False
                )
        row[0].set_ylabel(title, labelpad=6)
    title = f"What the model reads within {NORMS[report['norm']]} distance {distance(report['eps'])}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure


def _bars(axes: Axes, at: np.ndarray, values: list[float], width: float, colour: str, label: str) -> None:
    bars = axes.bar(at, values, width, color=colour, label=label, zorder=2)
    axes.bar_label(bars, [f"{100 * value:.0f}" for value in values], padding=2, fontsize=8, color=INK, zorder=3)


def _percent(axes: Axes) -> None:
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(5))
