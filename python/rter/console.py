"""Messages to the user other than results: lines on stderr, if it is open, and the progress of long work."""

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
MEASURED = 4  # steps after which a run's time is estimated; the first is a warm-up and not counted


def say(line: str) -> None:
    if sys.stderr is not None:  # it is None where the stream was closed, and print would take stdout
        from tqdm import tqdm

        tqdm.write(f"rter: {line}", file=sys.stderr)  # above a bar, if there is one
        sys.stderr.flush()


def at_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


class Progress:
    """A bar at a terminal. Elsewhere, as in the log of a batch job, a line every 30 s, for all kinds of work together.

    Args:
        what: the name of the work.
        total: how many units it has; None if unknown.
        unit: what it is counted in.
        done: how many units were done before.
        shown: False prints nothing.
        each: how many images a unit has, to report images per second.
        epoch: units in an epoch; if given, the time of an epoch and of the rest is estimated after the first few units.
    """

    spoken = time.monotonic()  # when any instance last printed a line

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
        """Shows the facts at the end of the bar."""
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
        """Says once how long an epoch and the rest will take, unless the rest is done before the next line is due."""
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
    """Whether a stop was asked for, by the user or by a batch system's time limit: the signal's number, or 0."""

    asked: int = 0


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM ask for a stop, which the loop makes at the end of its step; a second one stops at once."""
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = number
        say("stopping after this step; a second signal stops at once")

    with handling(ask, signal.SIGINT, signal.SIGTERM):
        yield stop


@contextmanager
def handling(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """Installs the handler for the signals; does nothing outside the main thread, where Python allows none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier or signal.SIG_DFL)
