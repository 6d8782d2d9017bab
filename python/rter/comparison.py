"""The comparison of a sweep: means over the seeds, differences paired by seed, and a picture."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from rter import plots
from rter.checkpoint import OPTIONAL, read_json, write_atomic
from rter.data.files import damaged
from rter.report import table
from rter.wording import COLUMNS

PAIRED = ("SA", "RA", "AA", "verdict")
Values = Sequence[float | None]
FORM = {"seeds": [int], "equal_time_epochs": dict, "rows": {str: {key: [OPTIONAL] for key in PAIRED}}}


def write_comparison(file: Path) -> Path:
    """Writes file.md and file.png from the file.json of a sweep; returns the path of file.md."""
    figures = read_json(file.with_suffix(".json"), FORM)
    seeds, rows = figures["seeds"], figures["rows"]
    if not rows:
        raise damaged(file.with_suffix(".json"), "it holds no rows")
    means = table({name: {key: _mean(row[key]) for key in row} for name, row in rows.items()})
    parts = [f"Mean and standard deviation over seeds {', '.join(map(str, seeds))}.", means]
    if figures["equal_time_epochs"]:
        epochs = ", ".join(f"{name} {count}" for name, count in figures["equal_time_epochs"].items())
        parts.insert(1, f"Every method was trained for as long as rt-er. Epochs: {epochs}.")
    first, *others = rows
    if others and len(seeds) > 1:
        differences = {name: {key: _difference(rows[first][key], rows[name][key]) for key in PAIRED} for name in others}
        parts += [
            f"{first} minus the row, paired by seed: the mean and, in brackets, its 95 % interval (Student's t).",
            table(differences),
        ]
    plots.draw_comparison(file.with_suffix(".png"), rows)
    parts.append(f"![Accuracy of each method]({file.name}.png)")
    parts.append("\n".join(f"- **{column}**: {meaning}" for column, meaning in COLUMNS.items() if column != "train s"))
    text = file.with_suffix(".md")
    write_atomic(text, "\n\n".join(parts) + "\n")
    return text


def _mean(values: Values) -> str | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean = statistics.mean(known)
    return f"{mean:.3f}" + (f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else "")


def _difference(first: Values, other: Values) -> str | None:
    """mean [low, high] of first - other, over the seeds."""
    from scipy.stats import t

    pairs = [a - b for a, b in zip(first, other, strict=True) if a is not None and b is not None]
    if len(pairs) < 2:
        return None
    mean, error = statistics.mean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))
    reach = float(t.ppf(0.975, len(pairs) - 1)) * error
    return f"{mean:+.3f} [{mean - reach:+.3f}, {mean + reach:+.3f}]"
