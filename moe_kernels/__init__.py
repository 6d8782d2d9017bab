"""Fast, memory-lean kernels for adversarially robust Mixture-of-Experts."""

from moe_kernels.attacks import APGD, PGD, ExpertAttack, JointAttack, RouterLogits, SoftBackward, attack_mode
from moe_kernels.build_info import __version__ as __version__
from moe_kernels.build_info import build_info
from moe_kernels.nn import (
    ExpertBatchNorm2d,
    ExpertCondConv2d,
    ExpertConv2d,
    ExpertLayerNorm,
    ExpertLinear,
    ExpertMLP,
    ExpertPreActResNet,
    ExpertResNet18,
    ExpertViT,
    ResNet18Trunk,
    RobustMoE,
    Routing,
)
from moe_kernels.ops import (
    combine,
    expert_batch_norm,
    expert_conv2d,
    expert_linear,
    group_by_expert,
    kl_divergence,
    mask_relu,
    pgd_step_,
    topk_route,
)
from moe_kernels.triton_kernels.tuning import autotune

__all__ = [
    "APGD",
    "PGD",
    "ExpertAttack",
    "ExpertBatchNorm2d",
    "ExpertCondConv2d",
    "ExpertConv2d",
    "ExpertLayerNorm",
    "ExpertLinear",
    "ExpertMLP",
    "ExpertPreActResNet",
    "ExpertResNet18",
    "ExpertViT",
    "JointAttack",
    "ResNet18Trunk",
    "RobustMoE",
    "RouterLogits",
    "Routing",
    "SoftBackward",
    "attack_mode",
    "autotune",
    "build_info",
    "combine",
    "expert_batch_norm",
    "expert_conv2d",
    "expert_linear",
    "group_by_expert",
    "kl_divergence",
    "mask_relu",
    "pgd_step_",
    "topk_route",
]
