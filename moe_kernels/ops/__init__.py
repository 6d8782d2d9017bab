"""The operators: one file each, with its whole contract."""

from moe_kernels._library import load
from moe_kernels.ops.expert_conv2d import expert_conv2d
from moe_kernels.ops.expert_linear import expert_linear
from moe_kernels.ops.expert_sum import expert_sum, index_sum

load()

__all__ = ["expert_conv2d", "expert_linear", "expert_sum", "index_sum"]
