"""Prints the ratios of a benchmark run as Markdown: `python benchmarks/ratios.py RESULTS.json`."""

import json
import operator
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

OURS = "moe_kernels"
COMPARE = {">=": operator.ge, "<": operator.lt, "<=": operator.le}


def verdict(value: float, target: str) -> str:
    """Whether the value meets a target such as ">= 1.3"."""
    if not target:
        return ""
    comparison, bound = target.split()
    return "met" if COMPARE[comparison](value, float(bound)) else "missed"


def readable(seconds: float) -> str:
    """Seconds as three digits and a unit."""
    unit, size = next(((u, s) for u, s in (("s", 1), ("ms", 1e-3)) if seconds >= s), ("us", 1e-6))
    digits = f"{seconds / size:.3g}"
    return f"{float(digits):g} {unit}"


def table(results: dict[str, Any]) -> str:
    groups: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in results["benchmarks"]:
        groups[row["group"]][row["name"]] = row
    lines = ["| what | beside | theirs | ours | ratio | target | |", "|---|---|---|---|---|---|---|"]
    for group, rows in groups.items():
        if OURS not in rows:
            continue
        targets = rows[OURS]["extra_info"]["targets"]
        for name in {**rows, **targets}:
            if name == OURS:
                continue
            target = targets.get(name, "")
            if name not in rows:
                lines.append(f"| {group} | {name} | not run | | | {target} | |")
                continue
            info, theirs = rows[name]["extra_info"], rows[name]["stats"]["median"]
            times = (readable(seconds / info["calls"]) for seconds in (theirs, info["ours"]))
            figures = f"{' | '.join(times)} | {info['ratio']:.2f}"
            lines.append(f"| {group} | {name} | {figures} | {target} | {verdict(info['ratio'], target)} |")
    machine = results["machine_info"]
    cpu = f"{machine.get('cpu', {}).get('brand_raw', machine['machine'])}, kernels {machine['kernels']}"
    bf16 = "in hardware" if machine["bf16"] else "emulated"
    pages = "on" if machine["huge_pages"] else "off"
    setting = f"{machine['threads']} threads, bf16 {bf16}, torch {machine['torch']}, huge pages {pages}"
    return "\n".join([f"{cpu}, {setting}.\n", *lines])


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
