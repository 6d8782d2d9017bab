"""Prints the ratios of a benchmark run as Markdown: `python benchmarks/ratios.py RESULTS.json`."""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

OURS = "moe_kernels"


def table(results: dict[str, Any]) -> str:
    groups: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in results["benchmarks"]:
        groups[row["group"]][row["name"]] = row
    lines = ["| what | beside | theirs, ms | ours, ms | ratio | target |", "|---|---|---|---|---|---|"]
    for group, rows in groups.items():
        if OURS not in rows:
            continue
        ours = rows[OURS]["stats"]["median"]
        targets = dict(rows[OURS]["extra_info"].get("target", []))
        for name, row in rows.items():
            if name == OURS:
                continue
            theirs = row["stats"]["median"]
            target = f">= {targets[name]:g}" if name in targets else ""
            lines.append(
                f"| {group} | {name} | {theirs * 1e3:.3g} | {ours * 1e3:.3g} | {theirs / ours:.2f} | {target} |"
            )
    machine = results["machine_info"]
    cpu = machine.get("cpu", {})
    lines.append(f"\n{cpu.get('brand_raw', machine['machine'])}, {cpu.get('count')} cores, torch {machine['torch']}.")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
