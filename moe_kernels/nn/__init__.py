"""Layers: parameters and calls of the operators, no kernels."""

from moe_kernels.nn.experts import ExpertLinear, ExpertMLP
from moe_kernels.nn.resnet import ExpertBatchNorm2d, ExpertConv2d, ExpertResNet18
from moe_kernels.nn.robust_moe import RobustMoE
from moe_kernels.nn.routing import Routing

__all__ = [
    "ExpertBatchNorm2d",
    "ExpertConv2d",
    "ExpertLinear",
    "ExpertMLP",
    "ExpertResNet18",
    "RobustMoE",
    "Routing",
]
