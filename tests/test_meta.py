"""Modules made on the meta device, then given memory and reset, are initialised like those made directly."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moe_kernels.nn
from moe_kernels import (
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
)
from moe_kernels.nn.experts import ExpertOutput
from moe_kernels.nn.preact import ExpertPreActBlock
from moe_kernels.nn.recompute import WithStatistics
from moe_kernels.nn.resnet import ExpertBasicBlock, ResNet18Stages
from moe_kernels.nn.robust_moe import ExpertList
from moe_kernels.nn.vit import ExpertAttention, ExpertTransformerBlock

MAKE: dict[type[nn.Module], Callable[[], nn.Module]] = {
    ExpertAttention: lambda: ExpertAttention(2, 16, 2),
    ExpertBasicBlock: lambda: ExpertBasicBlock(2, 8, 16, 2),
    ExpertBatchNorm2d: lambda: ExpertBatchNorm2d(2, 16),
    ExpertCondConv2d: lambda: ExpertCondConv2d(2, 3, 8, 16, 3),
    ExpertConv2d: lambda: ExpertConv2d(2, 8, 16, 3),
    ExpertLayerNorm: lambda: ExpertLayerNorm(2, 16),
    ExpertLinear: lambda: ExpertLinear(2, 16, 32),
    ExpertList: lambda: ExpertList([nn.Linear(32, 16), nn.BatchNorm1d(16)]),
    ExpertMLP: lambda: ExpertMLP(2, 16, 32),
    ExpertOutput: lambda: ExpertOutput(2, 32, 16),
    ExpertPreActBlock: lambda: ExpertPreActBlock(2, 8, 16, 2),
    ExpertPreActResNet: lambda: ExpertPreActResNet.resnet18(2, width=8),
    ExpertResNet18: lambda: ExpertResNet18(2, width=8),
    ResNet18Trunk: lambda: ResNet18Trunk(2, width=8),
    ExpertTransformerBlock: lambda: ExpertTransformerBlock(2, 16, 2),
    ExpertViT: lambda: ExpertViT(2, image_size=16, patch=4, width=16, depth=2, heads=2),
    RobustMoE: lambda: RobustMoE(16, 32, 4, shared_experts=1, balance_bias=True),
}


def modules() -> set[Any]:
    """Every module class in moe_kernels.nn that can be instantiated."""
    files = [file for _, file in inspect.getmembers(moe_kernels.nn, inspect.ismodule)]
    found = {c for file in files for _, c in inspect.getmembers(file, inspect.isclass)}
    return {c for c in found if issubclass(c, nn.Module) and c.__module__.startswith("moe_kernels.nn")}


def test_no_module_is_left_out() -> None:
    bases = {moe_kernels.nn.GroupedNetwork, WithStatistics, ResNet18Stages}
    assert modules() - bases == set(MAKE)


def reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def parents_first(net: nn.Module) -> None:
    for module in net.modules():
        reset(module)


def children_first(net: nn.Module) -> None:
    net.apply(reset)


@pytest.mark.parametrize("initialise", [parents_first, children_first])
@pytest.mark.parametrize("kind", MAKE, ids=lambda c: c.__name__)
def test_reset_parameters_after_meta(kind: type[nn.Module], initialise: Callable[[nn.Module], None]) -> None:
    direct = MAKE[kind]()
    with torch.device("meta"):
        net = MAKE[kind]()
    net = net.to_empty(device="cpu")
    initialise(net)
    expected, found = direct.state_dict(), net.state_dict()
    assert expected.keys() == found.keys()
    for name, x in expected.items():
        y = found[name]
        assert y.isfinite().all(), name
        if x.double().std(correction=0) < 1e-12:
            assert torch.equal(x, y), name
        else:
            n = x.numel()
            assert abs(y.mean()) < 6 * x.std() / n**0.5, name
            assert abs(y.std() / x.std() - 1) < 8 / n**0.5, name
            assert abs(y.abs().max() / x.abs().max() - 1) < 0.5, name
