"""How many bytes a forward keeps for its backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(function: Callable[[], Any], *, apart_from: nn.Module | None = None) -> int:
    """Bytes of the distinct storages that function() saves for a backward, without those of `apart_from`'s tensors.

    The result is kept alive while counting, so that no storage is freed and its address counted for another.
    """
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = function()
    state = [] if apart_from is None else [*apart_from.parameters(), *apart_from.buffers()]
    for tensor in state:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(storages.values())
