"""What `make gpu` found: a line of JSON for each check and each figure, written to disk as soon as it exists."""

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Report:
    """Appends to one file, from any number of processes at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, **entry: Any) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, (json.dumps(entry) + "\n").encode())  # one write, so that lines of two processes never mix
            os.fsync(file)
        finally:
            os.close(file)

    def check(self, name: str, function: Callable[[], None], kind: str = "check") -> bool:
        """Runs the function and reports the outcome; returns whether it raised nothing."""
        start = time.perf_counter()
        error = ""
        try:
            function()
        except Exception as exception:
            error = "".join(traceback.format_exception(exception, limit=-4))
        self.add(kind=kind, name=name, ok=not error, seconds=round(time.perf_counter() - start, 3), error=error)
        return not error

    def entries(self) -> list[dict[str, Any]]:
        """All complete lines; if the machine was taken away, the last one may be incomplete."""
        text = self.path.read_text() if self.path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]


def summary(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """What was checked, what failed, every figure, and what was cut off; works for a run that was killed, too."""
    begin = next((e for e in entries if e["kind"] == "begin"), {"plan": []})
    jobs = [e for e in entries if e["kind"] == "job"]
    done = {e["name"] for e in jobs if not e["cut_off"]}
    checks = [e for e in entries if e["kind"] == "check" or (e["kind"] == "job" and e["proves"] and not e["cut_off"])]
    missing = [e for e in entries if e["kind"] == "time" or (e["kind"] == "job" and not e["proves"])]
    beside = [e for e in entries if e["kind"] == "beside"]
    speed = [
        {k: v for k, v in e.items() if k != "kind"}
        | {"beside_ms": {b["who"]: b["ms"] for b in beside if (b["kernel"], b["shape"]) == (e["kernel"], e["shape"])}}
        for e in entries
        if e["kind"] == "speed"
    ]
    return {
        **{k: v for k, v in begin.items() if k not in ("kind", "plan")},
        "checks": {"passed": sum(e["ok"] for e in checks), "failed": [e for e in checks if not e["ok"]]},
        "not_measured": [e for e in missing if not e["ok"]],
        "skipped": {e["name"]: e["reason"] for e in entries if e["kind"] == "skipped"},
        "cut_off": [name for name in begin["plan"] if name not in done],
        "tiles": [{k: v for k, v in e.items() if k != "kind"} for e in entries if e["kind"] == "tile"],
        "speed": speed,
    }


def table(results: dict[str, Any]) -> str:
    """The figures in a few columns, then failures and what was cut off."""
    lines = [f"{'kernel':44}{'ms':>9}{'floor':>9}{'of floor':>9}{'TFLOP/s':>9}{'GB/s':>8}  beside (its time / ours)"]
    for row in results["speed"]:
        beside = ", ".join(f"{who} {ms / row['ms']:.2f}" for who, ms in row["beside_ms"].items())
        figures = f"{row['ms']:9.3f}{row['floor_ms']:9.3f}{row['floor_ms'] / row['ms']:9.1%}"
        lines.append(f"{row['kernel']:44}{figures}{row['tflops']:9.1f}{row['gb_per_s']:8.0f}  {beside}")
        lines.append(f"    {row['shape']}")
    failed, missing = results["checks"]["failed"], results["not_measured"]
    lines += [f"\nFAILED {e['name']}: {e['error']}" for e in failed]
    lines += [f"\nnot measured: {e['name']}: {e['error']}" for e in missing]
    lines += [f"skipped: {name}: {reason}" for name, reason in results["skipped"].items()]
    lines.append(f"\n{results['checks']['passed']} checks passed, {len(failed)} failed")
    lines.append(f"{len(results['speed'])} figures, {len(missing)} not measured")
    lines.append("cut off: " + (", ".join(results["cut_off"]) or "nothing"))
    return "\n".join(lines)
