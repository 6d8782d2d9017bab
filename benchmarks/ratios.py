"""Prints the ratios of a benchmark run as Markdown: `python benchmarks/ratios.py RESULTS.json`."""

import json
import operator
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

OURS = "moe_kernels"
COMPARE = {">=": operator.ge, "<": operator.lt}


def verdict(ratio: float, target: str) -> str:
    """Whether the ratio meets a target such as ">= 1.3"."""
    if not target:
        return ""
    comparison, bound = target.split()
    return "met" if COMPARE[comparison](ratio, float(bound)) else "missed"


def table(results: dict[str, Any]) -> str:
    groups: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in results["benchmarks"]:
        groups[row["group"]][row["name"]] = row
    lines = ["| what | beside | theirs, ms | ours, ms | ratio | target | |", "|---|---|---|---|---|---|---|"]
    for group, rows in groups.items():
        if OURS not in rows:
            continue
        ours = rows[OURS]["stats"]["median"]
        targets = rows[OURS]["extra_info"]["targets"]
        for name in {**rows, **targets}:
            if name == OURS:
                continue
            if name not in rows:
                lines.append(f"| {group} | {name} | not installed | {ours * 1e3:.3g} | | {targets[name]} | |")
                continue
            theirs, target = rows[name]["stats"]["median"], targets.get(name, "")
            ratio = theirs / ours
            figures = f"{theirs * 1e3:.3g} | {ours * 1e3:.3g} | {ratio:.2f}"
            lines.append(f"| {group} | {name} | {figures} | {target} | {verdict(ratio, target)} |")
    machine = results["machine_info"]
    cpu = machine.get("cpu", {}).get("brand_raw", machine["machine"])
    bf16 = "in hardware" if machine["bf16"] else "emulated"
    lines.append(f"\n{cpu}, {machine['threads']} threads, bf16 {bf16}, torch {machine['torch']}.")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
