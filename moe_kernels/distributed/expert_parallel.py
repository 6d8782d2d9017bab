"""Expert parallelism: each process holds some of the experts, and rows travel to them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from moe_kernels._torch import buffers_of, ddp_ignores, parameters_of
from moe_kernels.distributed.dispatch import AllToAll, CachedByTensor, Dispatcher
from moe_kernels.nn.robust_moe import ExpertList, RobustMoE
from moe_kernels.ops import Groups, combine, group_by_expert
from moe_kernels.ops.combine import gather_rows
from moe_kernels.ops.expert_sum import expert_of_row


class ExpertParallel(ParallelStyle):
    """Spreads the experts of a mixture over the processes of a mesh: `parallelize_module(moe, mesh, ExpertParallel())`.

    Process p of P keeps experts p E / P to (p + 1) E / P - 1. Each of the experts' tensors becomes a DTensor sharded in
    its first dimension. Each process routes its own rows, which travel to their experts and back. All processes must
    call the mixture the same number of times and in the same order; if one forces a route, all must.

    Each process has its own loss, and the experts' gradients are those of the mean of all losses, as
    DistributedDataParallel and FSDP give them for the router and the rest of the model.

    The module is a `RobustMoE` of an `ExpertMLP` or another grouped network, such a network itself, or the experts of a
    transformers mixture.

    Args:
        dispatcher: called with the mesh and the number of experts E, returns the `Dispatcher` that moves the rows.
        average: False for the gradients of the sum of all losses.

    Raises:
        ValueError: in `parallelize_module`, if the mesh is not one-dimensional, its size does not divide E, or the
            module has no grouped experts or is parallel already.
    """

    def __init__(self, dispatcher: Callable[[DeviceMesh, int], Dispatcher] = AllToAll, *, average: bool = True) -> None:
        super().__init__()
        self.dispatcher, self.average = dispatcher, average

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        experts = module.experts if isinstance(module, RobustMoE) else module
        assert isinstance(experts, nn.Module)
        if isinstance(experts, _Parallel):
            raise ValueError(f"module must not be parallel already, got {type(experts).__name__}")
        num_experts = _num_experts(experts)
        if device_mesh.ndim != 1:
            raise ValueError(f"mesh must have one dimension, such as mesh['ep'], got {device_mesh.ndim}")
        if num_experts % device_mesh.size():
            raise ValueError(f"mesh must have a size that divides the {num_experts} experts, got {device_mesh.size()}")
        for part in experts.modules():
            for name, p in parameters_of(part).items():
                if p is not None:
                    shard = distribute_tensor(p.detach(), device_mesh, [Shard(0)])
                    parameters_of(part)[name] = nn.Parameter(shard, p.requires_grad)
            for name, buffer in buffers_of(part).items():
                if buffer is not None:
                    buffers_of(part)[name] = distribute_tensor(buffer, device_mesh, [Shard(0)])
            if hasattr(part, "num_experts"):
                part.num_experts = num_experts // device_mesh.size()  # type: ignore[assignment]
        kind = _ParallelOfTransformers if _is_transformers(experts) else _Parallel
        own = type(experts)
        experts.__class__ = type(f"ExpertParallel{own.__name__}", (kind, own), {})
        experts.dispatcher = self.dispatcher(device_mesh, num_experts)  # type: ignore[assignment]
        experts.gradient_scale = 1 / device_mesh.size() if self.average else 1.0  # type: ignore[assignment]
        if isinstance(experts, _ParallelOfTransformers):
            experts.groups = CachedByTensor(lambda index: group_by_expert(index, num_experts))
        return module


class _Parallel(nn.Module):
    """Base class put before a grouped network's own, whose rows then come from all processes."""

    combines = False
    dispatcher: Dispatcher
    gradient_scale: float

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, ...] sorted by expert, offsets int32 [E + 1] of all experts -> [N, ...]."""
        x, offsets, sent = self.dispatcher.dispatch(x, offsets)
        with local_tensors(self):
            y = self.own_experts(x, offsets)
        return self.dispatcher.combine(y, sent)

    def own_experts(self, x: Tensor, offsets: Tensor) -> Tensor:
        return super().forward(x, offsets)


class _ParallelOfTransformers(_Parallel):
    """Base class put before that of the experts of a transformers mixture."""

    groups: CachedByTensor[Groups]

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H]."""
        order, position, offsets = self.groups(top_k_index)
        rows = gather_rows(hidden_states, order // position.shape[1], position)
        y = super().forward(rows, offsets)
        return combine(y, top_k_weights, position).to(hidden_states.dtype)

    def own_experts(self, x: Tensor, offsets: Tensor) -> Tensor:
        experts = expert_of_row(offsets, len(x)).long()[:, None]
        weights = torch.ones_like(experts, dtype=x.dtype)
        return super(_Parallel, self).forward(x, experts, weights)


@contextmanager
def local_tensors(experts: Any) -> Iterator[None]:
    """Inside, every parameter and buffer is a plain tensor: this process's part of it."""
    places = [
        (place, name, t)
        for m in experts.modules()
        for place in (parameters_of(m), buffers_of(m))
        for name, t in place.items()
    ]
    places = [(place, name, t) for place, name, t in places if isinstance(t, DTensor)]
    try:
        for table, name, t in places:
            part = t.to_local()
            table[name] = _Scaled.apply(part, experts.gradient_scale) if t.requires_grad else part
        yield
    finally:
        for table, name, t in places:
            table[name] = t


class _Scaled(torch.autograd.Function):
    """x itself; its gradient is multiplied by `scale`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def _is_transformers(module: nn.Module) -> bool:
    return hasattr(module, "_is_expert_parallel")


def _num_experts(experts: nn.Module) -> int:
    found = getattr(experts, "num_experts", None)
    tensors = [*experts.parameters(), *experts.buffers()]
    grouped = tensors and all(t.ndim > 0 and len(t) == found for t in tensors)
    if not grouped or isinstance(experts, ExpertList):
        raise ValueError(
            "module must have grouped experts, whose tensors are all [E, ...], such as ExpertMLP or ExpertResNet18, "
            f"got {type(experts).__name__}"
        )
    return int(found)  # type: ignore[arg-type]


def parallel_experts(model: nn.Module) -> list[nn.Module]:
    """The grouped networks in `model` that are spread over processes."""
    return [module for module in model.modules() if isinstance(module, _Parallel)]


def ddp_ignores_experts(model: nn.Module) -> nn.Module:
    """Tells DistributedDataParallel to ignore the model's tensors that are spread over processes -> the model."""
    names = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if isinstance(t, DTensor)]
    ddp_ignores(model, names)
    return model
