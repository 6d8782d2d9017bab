"""Exceptions that are reported to the user in one line, and hints at what may have been meant."""

import difflib
import re
from collections.abc import Iterable

# packages of the extra `rter`, by the names that they are imported by
EXTRA = ("PIL", "matplotlib", "numpy", "pyautoattack", "safetensors", "scipy", "sklearn", "tomli", "torch", "tqdm")


class UserError(Exception):
    """Shown as one line, without a traceback."""


class NonFiniteError(UserError):
    """The loss or its gradient is not finite; the weights are still those from before the step."""

    def __init__(self, what: str, value: float) -> None:
        super().__init__(f"{what} became {value}")


class Stopped(KeyboardInterrupt):
    """A signal stopped work that can be resumed; `status` is the exit status that stands for the signal."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


def missing_package(error: ModuleNotFoundError) -> str:
    """What to install, in one line, where a package of the extra is missing; empty for any other."""
    package = (error.name or "").partition(".")[0]
    return f"the package {package} is missing: pip install 'moe_kernels[rter]'" if package in EXTRA else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message that suggests the known name closest to the word, whatever its case and dashes; or ""."""

    def plain(name: str) -> str:
        return re.sub(r"[\W_]", "", name.lower())

    names = {plain(name): name for name in known}
    begun = [name for name in names if plain(word) and name.startswith(plain(word))]
    near = begun or difflib.get_close_matches(plain(word), names, 1, 0.7)
    return f": did you mean {names[near[0]]}?" if near else ""
