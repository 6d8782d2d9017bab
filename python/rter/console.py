"""What is said to the user beside the results: lines on stderr, where there is one, and the progress of long work."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

EVERY = 30.0  # seconds between two lines of progress
MEASURED = 4  # steps of which a run's time is estimated; the first, which warms up, is not counted


def say(line: str) -> None:
    if sys.stderr is not None:  # it is None where the stream was closed, and print would take stdout
        from tqdm import tqdm

        tqdm.write(f"rter: {line}", file=sys.stderr)  # above a bar, if there is one
        sys.stderr.flush()


def at_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


class Progress:
    """A bar at a terminal. Elsewhere, as in a queue's log, a line every 30 s, whichever work it is that goes on.

    Args:
        what: the name of the work.
        total: how many units it has; None if that is not known.
        unit: what it is counted in.
        done: how many were done before.
        shown: False says nothing.
        each: how many images a unit has, for their number in a second.
        epoch: units in an epoch; then the time of one and of all is said when some units have been measured.
    """

    spoken = time.monotonic()  # when any of them spoke last

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        shown: bool = True,
        leave: bool = False,
        each: int | None = None,
        epoch: int | None = None,
        scale: bool = False,
    ) -> None:
        from tqdm import tqdm

        self.what, self.total, self.unit, self.first, self.done = what, total, unit, done, done
        self.each, self.epoch, self.shown = each, epoch, shown
        terminal = shown and at_terminal()
        self.bar = tqdm(
            desc=what, total=total, initial=done, unit=unit, leave=leave, disable=not terminal, unit_scale=scale
        )
        self.speaks = shown and not terminal
        self.started = self.warm = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def note(self, facts: dict[str, str]) -> None:
        """Shows the facts behind the bar."""
        self.bar.set_postfix(facts)

    def update(self, units: int = 1, fact: Callable[[], str] = str) -> None:
        """Counts finished units; `fact` is asked when a line is due."""
        self.done += units
        self.bar.update(units)
        now = time.monotonic()
        if self.epoch and self.shown:
            self._estimate(self.epoch, now)
        if self.speaks and now - Progress.spoken >= EVERY:
            Progress.spoken = now
            rate = (self.done - self.first) / max(now - self.started, 1e-9)
            left = (self.total or self.done) - self.done
            parts = [
                f"{self.what}: {self.unit} {self.done}" + (f" of {self.total}" if self.total else ""),
                fact(),
                f"{rate * (self.each or 1):.3g} {'images' if self.each else self.unit + 's'}/s",
                f"done at {_clock(left / rate)}" if left else "",
            ]
            say(", ".join(filter(None, parts)))

    def _estimate(self, epoch: int, now: float) -> None:
        """Says once what an epoch and all that is left will take, if that is longer than until the next line."""
        measured = self.done - self.first
        if measured == 1:
            self.warm = now
        elif measured == MEASURED:
            unit = (now - self.warm) / (MEASURED - 1)
            left = unit * ((self.total or self.done) - self.done)
            if left >= EVERY:
                say(
                    f"{self.what}: an epoch of {epoch} {self.unit}s takes about {_span(unit * epoch)} and what is left "
                    f"about {_span(left)}, until {_clock(left)}, without the measurements on held-out images"
                )


def _span(seconds: float) -> str:
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


def _clock(seconds: float) -> str:
    """The time so many seconds from now, with the day if it is another."""
    then, now = datetime.now() + timedelta(seconds=seconds), datetime.now()
    return f"{then:%H:%M}" if then.date() == now.date() else f"{then:%Y-%m-%d %H:%M}"


@dataclass
class Stop:
    """Whether the user, or a queue whose time is over, has asked for a stop: the number of the signal, or 0."""

    asked: int = 0


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM ask for a stop, which a loop grants where its state is whole; the second stops at once."""
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = number
        say("stopping after this step; once more stops at once")

    with handling(ask, signal.SIGINT, signal.SIGTERM):
        yield stop


@contextmanager
def handling(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """The handler for signals, in the main thread, which alone may have one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier or signal.SIG_DFL)
