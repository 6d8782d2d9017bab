"""None of this package's gradients is summed by an operation that adds atomically on a GPU, in a varying order."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels import ExpertLinear, ExpertMLP, ExpertPreActResNet, ExpertResNet18, ExpertViT, RobustMoE
from moe_kernels.ops import expert_sum, index_sum
from moe_kernels.testing import Source

aten = torch.ops.aten
S = Source(torch.float32)

# From torch.use_deterministic_algorithms: operations that add to places chosen by an index tensor or a window.
INDEXED = {aten.index_add, aten.index_add_, aten.scatter_add, aten.scatter_add_}
WINDOWED = {
    aten.scatter_reduce,
    aten.put_,
    aten.embedding_dense_backward,
    aten._adaptive_avg_pool2d_backward,
    aten.adaptive_max_pool2d_backward,
    aten.max_pool2d_with_indices_backward,
    aten.upsample_bilinear2d_backward,
    aten.grid_sampler_2d_backward,
    aten.reflection_pad2d_backward,
    aten.replication_pad2d_backward,
}
ACCUMULATING = {aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index_put}


class AtomicSums(TorchDispatchMode):
    """Collects in `calls` the operations that add more than one term to a place; a single term has no order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func.overloadpacket
        if operation in INDEXED:
            _, dim, index, source = args[:4]
            sorted_index = index.sort(dim if index.ndim == source.ndim else 0).values
            collides = bool((sorted_index.diff(dim=dim if index.ndim == source.ndim else 0) == 0).any())
        elif operation in ACCUMULATING:
            collides = len(args) > 3 and args[3]
        else:
            collides = operation in WINDOWED
        if collides:
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def check(function: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> None:
    """First, second and third derivatives, in x and in the parameters."""
    leaves = [x.requires_grad_(), *parameters]
    with AtomicSums() as sums:
        y = function(x)
        for _ in range(3):
            grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True, allow_unused=True)
            y = torch.cat([g.flatten() for g in grads if g is not None and g.requires_grad])
    assert sums.calls == []


def images() -> Tensor:
    return S.randn(5, 3, 8, 8)


def image_router() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


def test_atomic_sums_are_detected() -> None:
    with pytest.raises(AssertionError, match="index_add"):
        check(lambda x: x.index_select(0, torch.tensor([0, 0, 1])), S.randn(2, 3))


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_in_a_list(top_k: int) -> None:
    experts = [nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Tanh()) for _ in range(3)]
    moe = RobustMoE.from_experts(experts, image_router(), top_k)
    check(moe, images(), *moe.parameters())


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(
    "network",
    [lambda: ExpertResNet18(3, num_classes=4, width=2), lambda: ExpertPreActResNet(3, 4, 3, ((2, 1), (4, 1)), 2)],
)
def test_grouped_networks(network: Callable[..., nn.Module], top_k: int) -> None:
    moe = RobustMoE.from_experts(network(), image_router(), top_k)
    x = images()
    with AtomicSums() as sums:
        moe(x.requires_grad_()).square().sum().backward()
    assert sums.calls == [] and x.grad is not None


def test_a_vision_transformer() -> None:
    vit = ExpertViT(2, num_classes=4, image_size=8, patch=4, width=8, depth=1, heads=2)
    x = images().requires_grad_()
    with AtomicSums() as sums:
        vit(x, S.offsets((2, 3))).square().sum().backward()
    assert sums.calls == [] and x.grad is not None


@pytest.mark.parametrize("recompute", ["none", "activations"])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_the_layer(activation: str, recompute: str) -> None:
    moe = RobustMoE(4, 6, 3, 2, activation=activation, recompute=recompute)
    check(moe, S.randn(5, 4), *moe.parameters())


def test_layers_and_sums() -> None:
    linear, mlp, offsets = ExpertLinear(3, 4, 5), ExpertMLP(3, 4, 6, "gelu"), S.offsets((2, 0, 3))
    rows = torch.tensor([0, 0, 1, 2, 0], dtype=torch.int32)
    check(lambda x: linear(x, offsets, rows), S.randn(3, 4), *linear.parameters())
    check(lambda x: mlp(x, offsets), S.randn(5, 4), *mlp.parameters())
    check(lambda x: expert_sum(x, offsets), S.randn(5, 4))
    check(lambda x: index_sum(x, rows, 3), S.randn(5, 4))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_gathered_gradient_is_the_ordered_sum(top_k: int, dtype: torch.dtype) -> None:
    """A row's slots are added in the order of its experts, in fp32 or wider, and rounded once."""
    s = Source(dtype)
    moe = RobustMoE.from_experts([nn.Identity() for _ in range(3)], nn.Flatten(), top_k, gate="hard", renormalize=False)
    x, grad = s.randn(6, 3).requires_grad_(), s.randn(6, 3)
    (out,) = torch.autograd.grad(moe(x), [x], grad)
    wide = torch.promote_types(dtype, torch.float32)
    expected = sum((grad.to(wide) for _ in range(top_k)), torch.zeros(6, 3, dtype=wide)).to(dtype)
    assert torch.equal(out, expected)
    assert torch.autograd.gradgradcheck(moe, s.randn(6, 3, dtype=torch.float64).requires_grad_())
