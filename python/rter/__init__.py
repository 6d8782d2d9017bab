"""Adversarially robust Mixture-of-Experts: train, evaluate, report."""

import os
from typing import Any

# torch reads this at its first allocation: large tensors on a CPU are then put in huge pages, if the system grants them
# on request. With ordinary pages, page faults took a seventh of an RT-ER step of ResNet-18 experts.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = ["Report", "UserError", "evaluate_model", "load_data", "load_model"]


def __getattr__(name: str) -> Any:
    """Imports the public names on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from rter import api
    except ModuleNotFoundError as error:
        from rter.errors import missing_package

        if message := missing_package(error):
            raise ModuleNotFoundError(message, name=error.name) from error
        raise
    return getattr(api, name)
