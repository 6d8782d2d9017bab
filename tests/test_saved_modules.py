"""Modules that an earlier version saved whole, by torch.save(model), load and run: none has needed a new attribute."""

import pytest
from torch import nn

from moe_kernels import ExpertPreActResNet, ExpertResNet18, ExpertViT, ResNet18Trunk, RobustMoE

ATTRIBUTES = {
    "ExpertLinear": {"num_experts", "in_features", "out_features", "init_std"},
    "ExpertOutput": {"num_experts", "in_features", "out_features"},
    "ExpertMLP": {"num_experts", "activation", "recompute"},
    "ExpertConv2d": {"num_experts", "stride", "padding", "bias"},
    "ExpertBatchNorm2d": {"num_experts", "eps", "momentum"},
    "ExpertLayerNorm": {"num_experts", "eps"},
    "ExpertResNet18": {"num_experts", "recompute"},
    "ExpertPreActResNet": {"num_experts", "recompute"},
    "ExpertPreActBlock": {"shortcut"},
    "ExpertViT": {"num_experts", "image_size", "recompute"},
    "ExpertAttention": {"heads"},
    "ResNet18Trunk": {"num_experts", "shared_stages", "recompute"},
    "RobustMoE": {"num_experts", "dim", "top_k", "gate", "renormalize", "groups", "scale", "shared", "router_given"},
}
MODELS = [
    ExpertResNet18(2, width=2),
    ExpertPreActResNet.resnet18(2, 10, 3, 2),
    ExpertViT(2, 10, 3, 8, 4, 4, 1, 1),
    ResNet18Trunk(1, width=2),
    RobustMoE(4, 4, 2),
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_no_attribute_is_new(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__module__.startswith("moe_kernels."):
            own = {name for name in vars(module).keys() - vars(nn.Module()).keys() if not name.startswith("_")}
            assert own <= ATTRIBUTES.get(type(module).__name__, set())
