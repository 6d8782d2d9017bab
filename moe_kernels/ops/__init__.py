"""The operators: one file each, with its whole contract."""

from moe_kernels._library import load
from moe_kernels.ops.expert_linear import expert_linear
from moe_kernels.ops.expert_sum import expert_sum, index_sum
from moe_kernels.ops.pgd_step_ import pgd_step_

load()

__all__ = ["expert_linear", "expert_sum", "index_sum", "pgd_step_"]
