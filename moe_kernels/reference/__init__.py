"""The one plain-torch meaning of every operator, under the operator's own name and signature."""

from moe_kernels.reference.combine import combine, combine_input_grad, combine_weight_grad
from moe_kernels.reference.expert_linear import expert_linear, expert_linear_weight_grad
from moe_kernels.reference.expert_sum import expert_sum, index_sum
from moe_kernels.reference.group_by_expert import group_by_expert
from moe_kernels.reference.kl_divergence import kl_divergence, kl_divergence_backward
from moe_kernels.reference.pgd_step_ import pgd_step_
from moe_kernels.reference.topk_route import topk_route

__all__ = [
    "combine",
    "combine_input_grad",
    "combine_weight_grad",
    "expert_linear",
    "expert_linear_weight_grad",
    "expert_sum",
    "group_by_expert",
    "index_sum",
    "kl_divergence",
    "kl_divergence_backward",
    "pgd_step_",
    "topk_route",
]
