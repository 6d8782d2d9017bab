"""The operators: one file each, with its whole contract."""

from moe_kernels._library import load
from moe_kernels.ops.combine import combine, combine_input_grad, combine_weight_grad
from moe_kernels.ops.expert_batch_norm import expert_batch_norm
from moe_kernels.ops.expert_conv2d import expert_conv2d
from moe_kernels.ops.expert_linear import expert_linear
from moe_kernels.ops.expert_mlp import expert_mlp_hidden_grad, expert_mlp_output
from moe_kernels.ops.expert_sum import expert_sum, index_sum
from moe_kernels.ops.group_by_expert import Groups, group_by_expert
from moe_kernels.ops.kl_divergence import kl_divergence
from moe_kernels.ops.mask_relu import mask_relu, mask_relu_forward, mask_relu_forward_
from moe_kernels.ops.pgd_step_ import pgd_step_, pgd_step_normalized_
from moe_kernels.ops.topk_route import topk_route, topk_route_backward
from moe_kernels.ops.winograd_conv2d import winograd_conv2d

load()

__all__ = [
    "Groups",
    "combine",
    "combine_input_grad",
    "combine_weight_grad",
    "expert_batch_norm",
    "expert_conv2d",
    "expert_linear",
    "expert_mlp_hidden_grad",
    "expert_mlp_output",
    "expert_sum",
    "group_by_expert",
    "index_sum",
    "kl_divergence",
    "mask_relu",
    "mask_relu_forward",
    "mask_relu_forward_",
    "pgd_step_",
    "pgd_step_normalized_",
    "topk_route",
    "topk_route_backward",
    "winograd_conv2d",
]
