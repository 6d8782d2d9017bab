"""FSDP, which swaps a module's parameters: between forwards a process has a shard of each, during them the whole."""

import sys
from typing import Any

from torch import Tensor, nn


def _found(model: object, kind: str) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # half a second to import
    if fsdp is None or not isinstance(model, nn.Module):
        return []
    return [m for m in model.modules() if isinstance(m, getattr(fsdp, kind))]


def units(model: object) -> list[Any]:
    """The modules in the model that fully_shard (FSDP2) was called on."""
    return _found(model, "FSDPModule")


def owners(model: nn.Module) -> dict[nn.Module, Any]:
    """For each module in the model whose parameters a unit in it swaps, that unit."""
    return {m: unit for unit in units(model) for m in unit.modules()}


def parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that units in the model swap."""
    return {p for unit in units(model) for p in unit.parameters()}


def reshard(model: nn.Module) -> None:
    """Puts the shards in the places of the whole parameters."""
    for unit in units(model):
        unit.reshard()


def entering(model: object, x: Tensor) -> Tensor:
    """x as the model can take it: FSDP1 cannot have torch.autograd.grad reach a leaf that it is given."""
    return x.view_as(x) if _found(model, "FullyShardedDataParallel") else x
