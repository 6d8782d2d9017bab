"""Finds, without a GPU, the operations for which the host would wait on one."""

from typing import Any

import torch
from torch import Tensor

from moe_kernels._torch import TorchDispatchMode, local_scalar_dense, tree_leaves, unique_operators

aten = torch.ops.aten

# Operations that read a value on the host, or whose result has a size that depends on values.
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

    These are reads of a value by the host, results whose size depends on values, and copies between devices. An
    operator of this package is judged as a whole, not by how it is computed on the CPU. Tensor.tolist goes unnoticed on
    a CPU tensor but raises on a meta tensor, so run code that must never wait on `device="meta"`.
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
    """Whether the host would wait on a GPU for the result `out` of func(*args, **kwargs)."""
    operation = func.overloadpacket
    if operation in WAITING:
        return True
    if operation in INDEXING:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
    return len({t.device.type for t in tensors}) > 1
