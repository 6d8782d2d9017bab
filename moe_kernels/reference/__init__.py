"""The definition of every operator in plain torch, under the operator's own name and signature."""

from moe_kernels.reference.combine import combine, combine_input_grad, combine_weight_grad
from moe_kernels.reference.expert_batch_norm import (
    expert_batch_norm,
    expert_batch_norm_forward,
    expert_batch_norm_input_grad,
    expert_batch_norm_param_grad,
)
from moe_kernels.reference.expert_conv2d import expert_conv2d, expert_conv2d_input_grad, expert_conv2d_weight_grad
from moe_kernels.reference.expert_linear import expert_linear, expert_linear_weight_grad
from moe_kernels.reference.expert_mlp import expert_mlp_hidden_grad, expert_mlp_output
from moe_kernels.reference.expert_sum import expert_sum, index_sum
from moe_kernels.reference.group_by_expert import group_by_expert
from moe_kernels.reference.kl_divergence import kl_divergence, kl_divergence_backward
from moe_kernels.reference.mask_relu import mask_relu, mask_relu_backward, mask_relu_forward, mask_relu_forward_
from moe_kernels.reference.pgd_step_ import pgd_step_, pgd_step_normalized_
from moe_kernels.reference.topk_route import topk_route, topk_route_backward
from moe_kernels.reference.winograd_conv2d import winograd_conv2d, winograd_conv2d_weight_grad

__all__ = [
    "combine",
    "combine_input_grad",
    "combine_weight_grad",
    "expert_batch_norm",
    "expert_batch_norm_forward",
    "expert_batch_norm_input_grad",
    "expert_batch_norm_param_grad",
    "expert_conv2d",
    "expert_conv2d_input_grad",
    "expert_conv2d_weight_grad",
    "expert_linear",
    "expert_linear_weight_grad",
    "expert_mlp_hidden_grad",
    "expert_mlp_output",
    "expert_sum",
    "group_by_expert",
    "index_sum",
    "kl_divergence",
    "kl_divergence_backward",
    "mask_relu",
    "mask_relu_backward",
    "mask_relu_forward",
    "mask_relu_forward_",
    "pgd_step_",
    "pgd_step_normalized_",
    "topk_route",
    "topk_route_backward",
    "winograd_conv2d",
    "winograd_conv2d_weight_grad",
]
