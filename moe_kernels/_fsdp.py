"""FSDP swaps a module's parameters: a process has a shard of each between forwards, and the whole during them."""

import sys
from typing import Any

from torch import nn


def _found(model: object, kind: str) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # an import would take half a second
    if fsdp is None or not isinstance(model, nn.Module):
        return []
    return [m for m in model.modules() if isinstance(m, getattr(fsdp, kind))]


def units(model: object) -> list[Any]:
    """The modules in the model that fully_shard (FSDP2) was called on."""
    return _found(model, "FSDPModule")


def owners(model: nn.Module) -> dict[nn.Module, Any]:
    """For each module in the model whose parameters FSDP2 swaps, the innermost unit that it belongs to."""
    return {m: unit for unit in units(model) for m in unit.modules()}


def needs_view(model: object) -> bool:
    """Whether a leaf must be passed as a view: torch.autograd.grad cannot reach one that is passed to FSDP1 itself."""
    return bool(_found(model, "FullyShardedDataParallel"))
