"""What a job of `make gpu` found: a line of JSON for each check and each measurement, written as they come."""

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Report:
    """Writes to a file that outlives its process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, **entry: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def check(self, name: str, function: Callable[[], None], kind: str = "check") -> bool:
        """Whether the function ran through; why not, otherwise, goes into the report."""
        start = time.perf_counter()
        error = ""
        try:
            function()
        except Exception as exception:
            error = "".join(traceback.format_exception(exception, limit=-4))
        self.add(kind=kind, name=name, ok=not error, seconds=round(time.perf_counter() - start, 3), error=error)
        return not error

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
