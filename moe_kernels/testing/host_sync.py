"""Finds, without a GPU, where the host would wait for one."""

from typing import Any

import torch
from torch import Tensor

from moe_kernels._torch import TorchDispatchMode, local_scalar_dense, tree_leaves, unique_operators

aten = torch.ops.aten

# They read a value, or have a result whose size depends on values.
WAITING = {
    local_scalar_dense,
    aten.allclose,
    aten.bincount,
    aten.equal,
    aten.histc,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten.unique_consecutive,
    aten.unique_dim,
    *unique_operators,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_}


class HostSyncs(TorchDispatchMode):
    """Collects in `calls` the operations inside it, backward included, for which the host would wait on a GPU.

    These are values read by the host, sizes that depend on values, and copies between devices; an operator of this
    package counts by its effect alone, not by how it is computed on the CPU. Tensor.tolist on a CPU tensor escapes it
    and raises on a meta tensor, so run on `device="meta"` what must not wait at all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if waits(func, args, kwargs or {}, out):
            self.calls.append(str(func))
        return out


def waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> bool:
    operation = func.overloadpacket
    if operation in WAITING:
        return True
    if operation in INDEXING:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
    return len({t.device.type for t in tensors}) > 1
