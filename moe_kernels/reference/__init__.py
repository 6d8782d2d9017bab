"""The one plain-torch meaning of every operator, under the operator's own name and signature."""

from moe_kernels.reference.expert_conv2d import expert_conv2d, expert_conv2d_input_grad, expert_conv2d_weight_grad
from moe_kernels.reference.expert_linear import expert_linear, expert_linear_weight_grad
from moe_kernels.reference.expert_sum import expert_sum, index_sum

__all__ = ["expert_conv2d", "expert_conv2d_input_grad", "expert_conv2d_weight_grad", "expert_linear", "expert_linear_weight_grad", "expert_sum", "index_sum"]
