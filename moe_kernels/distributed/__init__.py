"""Experts spread over processes, with torch's own parts."""

from moe_kernels.distributed.dispatch import AllToAll, Dispatcher
from moe_kernels.distributed.expert_parallel import ExpertParallel, ddp_ignores_experts, parallel_experts

__all__ = ["AllToAll", "Dispatcher", "ExpertParallel", "ddp_ignores_experts", "parallel_experts"]
