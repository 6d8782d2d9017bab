"""Expert parallelism: experts spread over processes, by torch's own device meshes and DTensors."""

from moe_kernels.distributed.dispatch import AllToAll, Dispatcher
from moe_kernels.distributed.expert_parallel import ExpertParallel, ddp_ignores_experts, parallel_experts

__all__ = ["AllToAll", "Dispatcher", "ExpertParallel", "ddp_ignores_experts", "parallel_experts"]
