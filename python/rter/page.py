"""report.html: one or more evaluated runs in a single file that loads nothing else, to be sent and read anywhere."""

import base64
import io
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from rter import plots
from rter.paired import FIGURES as FIGURES_PAIRED
from rter.paired import HEADING
from rter.wording import COLUMNS, certificate, counted, distance, measured_on, summary, verdict, weights_of

Runs = Mapping[str, dict[str, Any]]  # reports by the names of their runs
EXAMPLES_SHOWN = 12

# by the beginning of the name
ATTACKS = {
    "pgd on expert": "PGD on this expert alone; what it finds is tried on the whole model",
    "pgd on the experts' mean": "PGD on the mean of all experts",
    "pgd on the router": "PGD that makes the router choose another expert",
    "pgd": "projected gradient descent on the whole model, from several random starts",
    "apgd-ce": "PGD with an adaptive step size, on the cross-entropy (Croce and Hein 2020)",
    "apgd-dlr": "the same on the difference of logits ratio, which does not depend on the logits' scale",
    "apgd-t": "the same towards each of the likeliest wrong classes",
    "expert and route": "an expert together with the route to it, which ordinary attacks ignore",
    "joint": "all experts and the router at once",
    "soft gradient": "gradients through a mixture of all experts instead of the chosen one",
    "square": "random squares, without any gradient: a black box",
    "autoattack": "the standard ensemble: APGD-CE, APGD-T, FAB-T and Square (Croce and Hein 2020)",
}
FIGURES = {
    "SA": COLUMNS["SA"],
    "RA": COLUMNS["RA"],
    "AA": COLUMNS["AA"],
    "verdict": COLUMNS["verdict"],
    "RA-E mean": "accuracy of one expert alone under PGD on it: the mean over the experts",
    "RA-E min": "the same, of the weakest expert",
    "RA-E max": "the same, of the strongest expert",
    "RA-R": COLUMNS["RA-R"],
    "min load": COLUMNS["load"],
    "train s": COLUMNS["train s"],
}
CHECK_HELP = "Each looks for a sign of an attack that was too weak, or of gradients that are hidden."

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #3a3f47; --grey: #6b717b; --line: #e1e4e8; --edge: #b8bdc6;
  --clean: #0072b2; --bad: #c04f00; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #d9dce1; --grey: #9aa1ab; --line: #33373e;
  --edge: #565c66; --clean: #56b4e9; --bad: #ff9a52; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 56rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.verdict { font-weight: 600; border-left: .25rem solid var(--clean); padding-left: .75rem; }
small, figcaption { color: var(--grey); font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child { text-align: left; font-weight: 600; min-width: 10rem; overflow-wrap: normal; }
th:not(:first-child), td { white-space: nowrap; } th small, td small { display: block; font-weight: 400; }
.no { color: var(--bad); font-weight: 600; }
figure { margin: 1rem 0; } .plot svg { display: block; width: 100%; height: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .75rem; padding: 0; }
.cards li { list-style: none; } .cards img { width: 48%; image-rendering: pixelated; border: 2px solid var(--clean); }
.cards img.wrong { border-color: var(--bad); }
pre { overflow-x: auto; padding: .6rem; border: 1px solid var(--line); border-radius: .3rem; font-size: .85rem; }
"""


def make_page(runs: Runs, histories: Mapping[str, list[dict[str, Any]]], examples: Mapping[str, Mapping[str, Tensor]],
              folders: Mapping[str, Path], differences: Mapping[str, Mapping[str, str | None]] | None = None,
              ) -> str:  # fmt: skip
    """The page of the runs, the first of which is told whole where it is alone or has `examples`.

    Args:
        differences: of the first run's figures from those of others, see `rter.paired`.
    """
    first = next(iter(runs))
    title = f"{first}: {runs[first]['method']}" if len(examples) == 1 else f"{len(runs)} runs: {', '.join(runs)}"
    parts = [f"<h1>{escape(title)}</h1>"]
    for name in examples:
        heading = f"<strong>{escape(name)}</strong>. " if len(runs) > 1 else ""
        parts.append(f"<p>{heading}{escape(setting(runs[name]))}</p>")
        parts.append(f'<p class="verdict">{escape(verdict(runs[name]))}</p>')
        if proved := certificate(runs[name]):
            parts.append(f"<p>{escape(proved)}</p>")
    parts += ["<h2>Figures</h2>", _figures(runs), _plot("accuracy", "Accuracy against the radius of the perturbation, "
              "with one standard error to either side", lambda: plots.accuracy(dict(runs), runs[first]))]  # fmt: skip
    if differences:
        rows = [(name, "", [value or "-" for value in row.values()]) for name, row in differences.items()]
        parts += ["<h2>Differences</h2>", f"<p>{escape(first)} {HEADING}</p>", _table(("run", *FIGURES_PAIRED), rows)]
    for name in examples:
        parts += _run(name, runs[name], histories.get(name, []), examples[name], len(examples) > 1)
    parts += ["<h2>How to reproduce this</h2>", *(_origin(name, runs[name], folders[name]) for name in examples)]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def setting(report: dict[str, Any]) -> str:
    """What was measured, and on which images, in a few sentences."""
    attack, experts = report["attack"], report["num_experts"]
    model = f"{experts} experts" if experts > 1 else "one network, without a route"
    data = f" on {report['data']}" if report["data"] else ""
    epochs = f", {counted(report['epochs'], 'epoch')}" if report["epochs"] else ""
    return (
        f"Method {report['method']}{data}{epochs}; {model}. Perturbations within {report['norm']} distance "
        f"{distance(report['eps'])}. Measured on {measured_on(report)}{weights_of(report)}: {attack['steps']} steps of "
        f"PGD with {counted(attack['restarts'], 'random start')}, and the {report['suite']} suite of attacks. "
        f"Seed {report['seed']}."
    )


def _figures(runs: Runs) -> str:
    summaries = {name: summary(report) for name, report in runs.items()}
    rows = []
    for figure, meaning in FIGURES.items():
        values = []
        for name, report in runs.items():
            value = summaries[name][figure]
            shown = "-" if value is None else f"{value:.0f}" if figure == "train s" else f"{value:.1%}"
            low, high = report["intervals"].get(figure.lower(), (None, None))
            values.append(shown + ("" if low is None else f"<small>{low:.1%} to {high:.1%}</small>"))
        if any(value != "-" for value in values):
            rows.append((figure, meaning, values))
    note = "<p><small>In small print: 95 % intervals by Wilson, for the choice of the images.</small></p>"
    return _table(("figure", *runs), rows) + note


def _run(
    name: str, report: dict[str, Any], history: list[dict[str, Any]], examples: Mapping[str, Tensor], named: bool
) -> list[str]:
    """The sections about a single run."""
    of = f" of {escape(name)}" if named else ""
    parts = []
    if report.get("attack_results"):
        results = [
            (r["name"], _meaning(r["name"]), [r["attacked"], r["broken"], r["new"], f"{r['accuracy']:.1%}"])
            for r in report["attack_results"]
        ]
        head = ("attack", "tried on", "broke", "new", "left")
        note = ("Tried on: how many images. Broke: how many of them the model then misclassified. New: how many of "
                "these no earlier attack had broken. Left: the fraction of all images still classified correctly. "
                "Broken images are not attacked again, except by attacks with a figure of their own.")  # fmt: skip
        parts += [f"<h2>Attacks{of}</h2>", _table(head, results), f"<p><small>{note}</small></p>"]
    checks = []
    for check, found in report["checks"].items():
        value = "" if found["value"] is None else f"{found['value']:.4g}"
        checks.append((check, "", ["yes" if found["passed"] else '<span class="no">no</span>', value]))
    parts += [f"<h2>Checks of the evaluation{of}</h2>", f"<p>{CHECK_HELP}</p>"]
    parts.append(_table(("check", "passed", "value"), checks))
    parts += [f"<p class='no'>AutoAttack warned: {escape(flag)}</p>" for flag in report["aa_flags"] or ()]
    drawn: dict[str, tuple[str, str, Callable[[], Figure]]] = {}
    if report["num_experts"] > 1 and report["ra_e"]:
        drawn["experts"] = ("Experts", "Images that each expert gets, and its accuracy alone under PGD on it",
                            lambda: plots.experts(report))  # fmt: skip
    if history:
        drawn["learning"] = ("Training", "Accuracy on held-out images, and the loss and its terms, over the epochs",
                             lambda: plots.learning(history))  # fmt: skip
    for plot, (heading, caption, draw) in drawn.items():
        key = re.sub(r"\W", "", f"{plot}{name}", flags=re.ASCII)
        parts += [f"<h2>{heading}{of}</h2>", _plot(key, caption, draw)]
    return [*parts, f"<h2>Images{of}</h2>", _cards(report, examples)]


def _meaning(attack: str) -> str:
    return next((meaning for start, meaning in ATTACKS.items() if attack.startswith(start)), "")


def _table(head: Sequence[str], rows: Sequence[tuple[str, str, Sequence[Any]]]) -> str:
    """A table; each row is a name, its meaning, and cells, which are HTML."""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for name, meaning, cells in rows:
        explained = f"<small>{escape(meaning)}</small>" if meaning else ""
        values = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f"<tr><th>{escape(name)}{explained}</th>{values}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _plot(name: str, caption: str, draw: Callable[[], Figure]) -> str:
    """A figure as SVG in the page's colours; its ids start with `name`, so that they are unique in the page."""
    text = {"text.color": plots.INK, "axes.titlecolor": plots.INK, "svg.fonttype": "none", "svg.hashsalt": name}
    with plt.rc_context(plots.STYLE | text):
        figure = draw()
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    for colour, variable in ((plots.INK, "ink"), (plots.GREY, "grey"), ("#e7e9ed", "line"), ("#b8bdc6", "edge")):
        svg = re.sub(colour, f"var(--{variable})", svg, flags=re.IGNORECASE)
    width = f"min-width: {5.4 * figure.get_figwidth():.0f}rem"  # letters of at least 9 px, even on a phone
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" style="{width}" ', 1)
    return f'<figure><div class="plot wide">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>'


def _cards(report: dict[str, Any], examples: Mapping[str, Tensor]) -> str:
    """An image of each class, clean and attacked, with the model's predictions."""
    names = report.get("classes") or []
    low, high = report.get("bounds") or (0.0, 1.0)

    def called(label: Tensor) -> str:
        number = int(label)
        return names[number] if number < len(names) else f"class {number}"

    cards = []
    for i in range(min(len(examples["label"]), EXAMPLES_SHOWN)):
        label, said = examples["label"][i], [examples["clean"][i], examples["adversarial"][i]]
        pictures = "".join(
            f'<img class="{"right" if read == label else "wrong"}" alt="{kind} image, read as {escape(called(read))}" '
            f'src="{_png((image[i] - low) / (high - low))}"> '
            for kind, image, read in zip(("clean", "attacked"), (examples["x"], examples["x_adv"]), said, strict=True)
        )
        reads = " and ".join(dict.fromkeys(escape(called(read)) for read in said))
        cards.append(f"<li>{pictures}<br>{escape(called(label))}<br><small>read as {reads}</small></li>")
    note = (
        f"Left: the original; right: what PGD made of it within {report['norm']} distance {distance(report['eps'])}. "
        "The frame is blue if the model classifies the image correctly, and orange if it does not."
    )
    return f'<p>{escape(note)}</p><ul class="cards">{"".join(cards)}</ul>'


def _png(image: Tensor) -> str:
    """An image [C, H, W] in [0, 1] as a data URL."""
    from PIL import Image

    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    levels = levels[:, :, :3] if levels.shape[2] >= 3 else levels[:, :, 0]
    file = io.BytesIO()
    Image.fromarray(levels.numpy()).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _origin(name: str, report: dict[str, Any], folder: Path) -> str:
    """How to reproduce the run: the command, the versions, the machine and the seed."""
    made, attack, sample = report.get("made_with", {}), report["attack"], report.get("sample")
    if report.get("command"):
        command = report["command"]
    elif report["split"] == "given" or report["weights"] not in ("last", "best"):
        command = f"rter.evaluate_model(model, x, y, eps={report['eps']!r}, norm={report['norm']!r}, "
        command += (
            f"suite={report['suite']!r}, steps={attack['steps']}, restarts={attack['restarts']}, seed={report['seed']})"
        )
    else:
        run = Path(report.get("run") or folder)
        words = ["rter", "evaluate", str(run), "--weights", report["weights"], "--suite", report["suite"], "--steps",
                 str(attack["steps"]), "--restarts", str(attack["restarts"])]  # fmt: skip
        words += ["--queries", str(report["queries"])] if report.get("queries") else []
        words += ["--images", str(report["held_out"])] if sample else []
        words += ["--out", str(folder)] if report.get("run") else []
        command = f"rter train --config {shlex.quote(str(run / 'config.json'))} --out NEW\n{shlex.join(words)}"
    versions = [f"moe_kernels {made.get('moe_kernels', 'unknown')}", f"torch {report.get('torch', 'unknown')}"]
    versions += [f"Python {made.get('python', 'unknown')}", f"on {made.get('device', 'a machine that was not noted')}"]
    versions += [f"{made['threads']} threads"] if made.get("threads") else []
    return (
        f"<p><strong>{escape(name)}</strong>: {escape(', '.join(versions))}; seed {report['seed']}, from which every "
        f"draw of training, of the images and of the attacks follows.</p><pre>{escape(command)}</pre>"
    )
