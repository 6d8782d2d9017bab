"""FSDP swaps a module's parameters: a process has a shard of each between forwards, and the whole during them."""

import sys
from typing import Any

from torch import Tensor, nn


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


def parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that units in the model swap."""
    return {p for unit in units(model) for p in unit.parameters()}


def reshard(model: nn.Module) -> None:
    """Replaces whole parameters with their shards."""
    for unit in units(model):
        unit.reshard()


def as_input(model: object, x: Tensor) -> Tensor:
    """x, for FSDP1 as a view: torch.autograd.grad cannot reach a leaf that is passed to FSDP1 itself."""
    return x.view_as(x) if _found(model, "FullyShardedDataParallel") else x
