"""The figures of a report, in one style: colour-blind-safe (Okabe and Ito), light grid, no frame."""

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

matplotlib.use("Agg")

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8A8F98"
OTHERS = (ORANGE, GREEN, "#CC79A7", "#56B4E9", GREY)
STYLE = {
    "figure.dpi": 160,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": "#3A3F47",
    "axes.edgecolor": "#B8BDC6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E7E9ED",
    "grid.linewidth": 0.8,
    "xtick.color": "#3A3F47",
    "ytick.color": "#3A3F47",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
}


def draw(
    folder: Path, name: str, report: dict[str, Any], history: list[dict[str, Any]], examples: dict[str, Tensor]
) -> None:
    """Writes accuracy.png, learning.png, experts.png (if there are several) and images.png."""
    folder.mkdir(exist_ok=True)
    figures = {
        "accuracy": lambda: accuracy({name: report, **report["baselines"]}, report),
        "learning": lambda: learning(history),
        "images": lambda: images(report, examples),
    }
    if report["num_experts"] > 1:
        figures["experts"] = lambda: experts(report)
    with plt.rc_context(STYLE):
        for file, figure in figures.items():
            drawn = figure()
            drawn.savefig(folder / f"{file}.png", facecolor="white")
            plt.close(drawn)


def accuracy(runs: dict[str, dict[str, Any]], report: dict[str, Any]) -> Figure:
    """Accuracy against eps of the run and its baselines."""
    figure, axes = plt.subplots(figsize=(5.6, 3.4))
    for (name, run), colour in zip(runs.items(), (BLUE, *OTHERS), strict=False):
        eps, values = np.array(run["eps_curve"]).T
        axes.plot(eps, values, "o-", color=colour, markersize=4, clip_on=False, label=name, zorder=3)
    axes.axvline(report["eps"], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"trained at {report['eps']:.3g}",
        (report["eps"], 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -2),
        textcoords="offset points",
        color=GREY,
        va="top",
    )
    axes.set(title="Accuracy under attack", xlabel=f"radius of the {report['norm']} perturbation", xlim=(0, None))
    _percent(axes)
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.9))
    return figure


def learning(history: list[dict[str, Any]]) -> Figure:
    """Held-out accuracies and the terms of the loss over the epochs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2))
    epochs = [record["epoch"] for record in history]
    for key, colour, label in (("sa", GREEN, "clean"), ("ra", BLUE, "under the training attack")):
        points = [(record["epoch"], record[key]) for record in history if key in record]
        left.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3.5, clip_on=False, label=label, zorder=3)
    left.set(title="Held-out accuracy", xlabel="epoch", xlim=(0, epochs[-1]))
    _percent(left)
    left.legend(loc="lower right")
    terms = [name for name in history[0] if name not in ("epoch", "lr", "seconds", "sa", "ra")]
    for name, colour in zip(terms, ("#22252A", BLUE, ORANGE, GREEN, "#CC79A7"), strict=False):
        right.plot(epochs, [record[name] for record in history], color=colour, label=name.replace("_", " "))
    right.set(title="Training loss and its terms", xlabel="epoch", xlim=(0, epochs[-1]), ylim=(0, None))
    right.legend()
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def experts(report: dict[str, Any]) -> Figure:
    """Each expert's part of the images, clean and under attack, and its own robust accuracy."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), width_ratios=(3, 2))
    at = np.arange(report["num_experts"])
    for key, shift, colour, label in (
        ("expert_load", -0.19, GREEN, "clean"),
        ("expert_load_adversarial", 0.19, RED, "under attack"),
    ):
        _bars(left, at + shift, report[key], 0.36, colour, label)
    left.axhline(1 / report["num_experts"], color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=4)
    left.set(title="Images that each expert gets")
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    left.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    _bars(right, at, report["ra_e"], 0.6, BLUE, "")
    right.set(title="Each expert alone, under attack on it")
    _percent(right)
    for axes in (left, right):
        axes.set_xticks(at, [f"expert {e}" for e in at])
        axes.grid(axis="x", visible=False)
    return figure


def images(report: dict[str, Any], examples: dict[str, Tensor]) -> Figure:
    """One image of each class, clean and adversarial, with what the model says to it."""
    count = len(examples["label"])
    figure, grid = plt.subplots(2, count, figsize=(0.9 * count, 2.35), squeeze=False)
    rows = (("clean", "x", "clean"), (f"eps {report['eps']:.3g}", "x_adv", "adversarial"))
    for row, (title, pixels, predicted) in zip(grid, rows, strict=True):
        for i, axes in enumerate(row):
            image = examples[pixels][i].permute(1, 2, 0).squeeze(-1).numpy()
            right = examples[predicted][i] == examples["label"][i]
            axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
            axes.grid(False)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color=GREEN if right else RED, linewidth=1.6)
            axes.set_xlabel(f"{examples[predicted][i]}", color=GREEN if right else RED, weight="bold", labelpad=2)
        row[0].set_ylabel(title, labelpad=6)
    figure.suptitle("What the model reads", x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure


def _bars(axes: Axes, at: np.ndarray, values: list[float], width: float, colour: str, label: str) -> None:
    bars = axes.bar(at, values, width, color=colour, label=label)
    axes.bar_label(bars, [f"{100 * value:.0f}" for value in values], padding=2, fontsize=8, color="#3A3F47")


def _percent(axes: Axes) -> None:
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(5))
