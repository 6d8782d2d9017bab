"""What is said to the user beside the results: lines on stderr, where there is one."""

import sys


def say(line: str) -> None:
    if sys.stderr is not None:  # it is None where the stream was closed, and print would take stdout
        print(f"rter: {line}", file=sys.stderr, flush=True)


def at_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
