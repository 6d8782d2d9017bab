"""Adversarially robust Mixture-of-Experts: train, evaluate, report."""

import os
from typing import Any

# torch reads this when it first allocates: with it, large tensors on a CPU come in huge pages, where the system lends
# them on request. Page by page, a seventh of an RT-ER step of ResNet-18 experts went to page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = ["Report", "UserError", "evaluate_model", "load_model"]


def __getattr__(name: str) -> Any:
    """The public names, whose imports wait until they are asked for."""
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
