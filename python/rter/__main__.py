"""Runs the command line; an error while the rest is imported is reported in one line too."""

import os
import sys
from typing import NoReturn

from rter.errors import missing_package


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status, 2 for a user's mistake, which is reported in one line."""
    _open_closed_streams()
    try:
        from rter.commands import run

        return run(arguments)
    except ModuleNotFoundError as error:
        message = missing_package(error)
        if not message:
            raise
        print(f"rter: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rter: stopped", file=sys.stderr)
        return 130


def command() -> NoReturn:
    """Runs the command that the process was started for, and ends the process."""
    status = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":  # torchrun's number of processes
        # Gloo's threads take the GIL to free tensors, and one that waits for it when Python is finalised aborts the
        # process (pytorch#190489). They outlive the group that is destroyed: caches of DTensor hold it.
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:  # a full disk
            status = status or 1
        os._exit(status)
    sys.exit(status)


def _open_closed_streams() -> None:
    """Opens /dev/null for closed standard streams; the next file, one of weights perhaps, would get their number."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115


if __name__ == "__main__":
    command()
