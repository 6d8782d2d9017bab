"""Former names of the public interface, which keep working for one version, with a DeprecationWarning."""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def _caller() -> int:
    """The stack level, for the function that asks, of its caller's line, which is outside of torch.

    Between a user's line and a module's forward stands nn.Module.__call__, and Python shows a DeprecationWarning only
    where it is the user's own.
    """
    level, frame = 2, sys._getframe(2)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("torch."):
        level, frame = level + 1, frame.f_back
    return level


def renamed_argument(old: str, new: str) -> Callable[[F], F]:
    """Decorator for a function whose argument `new` used to be called `old`."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"{function.__name__} got both {new} and {old}, its former name")
                if not torch.compiler.is_compiling():  # which cannot trace a warning
                    warnings.warn(f"{function.__name__}: {old} is called {new}", DeprecationWarning, _caller())
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate
