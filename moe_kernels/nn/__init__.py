"""Layers: parameters and calls of the operators, no kernels."""

from moe_kernels.nn.cond_conv import ExpertCondConv2d
from moe_kernels.nn.experts import ExpertMLP
from moe_kernels.nn.grouped import GroupedNetwork
from moe_kernels.nn.layers import ExpertBatchNorm2d, ExpertConv2d, ExpertLayerNorm, ExpertLinear
from moe_kernels.nn.preact import ExpertPreActResNet
from moe_kernels.nn.resnet import ExpertResNet18
from moe_kernels.nn.robust_moe import RobustMoE
from moe_kernels.nn.routing import Routing
from moe_kernels.nn.trunk import ResNet18Trunk
from moe_kernels.nn.vit import ExpertViT

__all__ = [
    "ExpertBatchNorm2d",
    "ExpertCondConv2d",
    "ExpertConv2d",
    "ExpertLayerNorm",
    "ExpertLinear",
    "ExpertMLP",
    "ExpertPreActResNet",
    "ExpertResNet18",
    "ExpertViT",
    "GroupedNetwork",
    "ResNet18Trunk",
    "RobustMoE",
    "Routing",
]
