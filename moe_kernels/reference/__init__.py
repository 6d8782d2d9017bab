"""The one plain-torch meaning of every operator, under the operator's own name and signature."""

from moe_kernels.reference.expert_linear import expert_linear, expert_linear_weight_grad
from moe_kernels.reference.expert_sum import expert_sum, index_sum
from moe_kernels.reference.pgd_step_ import pgd_step_

__all__ = ["expert_linear", "expert_linear_weight_grad", "expert_sum", "index_sum", "pgd_step_"]
