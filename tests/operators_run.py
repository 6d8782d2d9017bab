"""Which operators a function runs."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Names(TorchDispatchMode):
    """Collects in `names` the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name.removeprefix("moe_kernels::"))
        return func(*args, **kwargs or {})


def operators(function: Callable[[], Any]) -> set[str]:
    with Names() as recorder:
        function()
    return recorder.names
