"""Grouped networks give the same results with recompute="all", and then only one expert has activations at a time."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe_kernels import ExpertPreActResNet, ExpertResNet18, ExpertViT, attack_mode
from moe_kernels.nn.grouped import GroupedNetwork
from moe_kernels.testing import Source
from moe_kernels.testing.networks import randomize_statistics
from moe_kernels.testing.saved import saved_bytes

COUNTS = (3, 0, 2)
NETWORKS: dict[str, Callable[..., GroupedNetwork]] = {
    "resnet": lambda **options: ExpertResNet18(3, 7, 3, 4, **options),
    "preact": lambda **options: ExpertPreActResNet.resnet18(3, 7, 3, 4, **options),
    "wide": lambda **options: ExpertPreActResNet.wide(3, 7, 3, 10, 4, **options),
    "vit": lambda **options: ExpertViT(3, 7, 3, 8, 4, 12, 2, 3, **options),
}


def make(name: str = "resnet", recompute: str = "all", **options: Any) -> GroupedNetwork:
    torch.manual_seed(0)
    return randomize_statistics(NETWORKS[name](recompute=recompute, **options))


def rows(*counts: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images that require a gradient, and the experts' offsets."""
    return Source(dtype).rand(sum(counts), 3, 8, 8).requires_grad_(), Source(dtype).offsets(counts)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["preact", "wide", "vit"])
def test_equals_all_experts_at_once(name: str, training: bool) -> None:
    nets = [make(name, recompute, dtype=torch.float64).train(training) for recompute in ("none", "all")]
    found = []
    for net in nets:
        x, offsets = rows(*COUNTS, dtype=torch.float64)
        y = net(x, offsets)
        y.square().sum().backward()
        found.append((y, x.grad, [p.grad for p in net.parameters()], net.state_dict()))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name, at_most", [("preact", 0.55), ("wide", 0.55), ("vit", 0.65)])
def test_recomputing_activations_changes_no_bit_and_saves_memory(name: str, at_most: float, autocast: bool) -> None:
    found, kept = [], []
    for recompute in ("none", "activations"):
        net, (x, offsets) = make(name, recompute), rows(*COUNTS)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = net(x, offsets)
        for _ in range(2):
            y.float().square().sum().backward(retain_graph=True)
        found.append((y, x.grad, *(p.grad for p in net.parameters()), *net.state_dict().values()))
        more = [rows(*(images * n for n in COUNTS)) for images in (4, 8)]
        few, many = (saved_bytes(lambda net=net, m=m: net(*m), apart_from=net) for m in more)
        kept.append(many - few)
    assert all(map(torch.equal, *found))
    assert kept[1] <= at_most * kept[0]


@pytest.mark.parametrize("name", ["preact", "vit"])
def test_recomputed_activations_have_second_derivatives(name: str) -> None:
    found = []
    for recompute in ("none", "activations"):
        net, (x, offsets) = make(name, recompute, dtype=torch.float64), rows(*COUNTS, dtype=torch.float64)
        with sdpa_kernel(SDPBackend.MATH):
            (dx,) = torch.autograd.grad(net(x, offsets).square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(dx.square().sum(), [x, *net.parameters()], allow_unused=True))
    torch.testing.assert_close(*found)


def test_some_parameters_may_be_frozen() -> None:
    found = []
    for recompute in ("none", "all"):
        net, (x, offsets) = make(recompute=recompute), rows(*COUNTS)
        net.requires_grad_(False)
        net.linear.requires_grad_()
        net.bn1.bias.requires_grad_()
        net(x.detach(), offsets).sum().backward()
        found.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == {"linear.weight", "linear.bias", "bn1.bias"}
    assert all(map(torch.equal, found[0].values(), found[1].values()))


def test_one_expert_at_a_time_has_activations() -> None:
    def most_alive(*counts: int) -> int:
        """The largest number of bytes saved at the same time while the backward runs."""
        net, alive, most = make(), 0, 0

        class Saved:
            def __init__(self, x: Tensor) -> None:
                self.x = x
                count(x.nbytes)
                weakref.finalize(self, count, -x.nbytes)

        def count(nbytes: int) -> None:
            nonlocal alive, most
            alive += nbytes
            most = max(most, alive)

        loss = net(*rows(*counts)).sum()
        with saved_tensors_hooks(Saved, lambda saved: saved.x):
            loss.backward()
        return most

    assert most_alive(*COUNTS) == most_alive(3, 0, 0) > most_alive(2, 0, 0)


def test_an_attack_recomputes_nothing() -> None:
    kept = []
    for recompute in ("none", "all"):
        net, (x, offsets) = make(recompute=recompute), rows(*COUNTS)
        with attack_mode(net):
            kept.append(saved_bytes(lambda net=net, x=x, offsets=offsets: net(x, offsets), apart_from=net))
    assert kept[0] == kept[1]


def test_the_backward_has_the_mode_and_weights_of_the_forward() -> None:
    net, (x, offsets) = make(), rows(*COUNTS)
    (expected,) = torch.autograd.grad(net(x, offsets).square().sum(), x)
    loss = net(x, offsets).square().sum()
    net.eval()
    assert torch.equal(*torch.autograd.grad(loss, x, retain_graph=True), expected)
    with torch.no_grad():
        net.conv1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_rows() -> None:
    net, (x, offsets) = make(), rows(0, 0, 0)
    net(x, offsets).sum().backward()
    assert all(not p.grad.any() for p in net.parameters())


def test_compiles_without_a_graph_break() -> None:
    net, (x, offsets) = make("wide"), rows(*COUNTS)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, offsets), net(x, offsets))


def test_bad_input_names_the_argument() -> None:
    for name in ("preact", "vit"):
        with pytest.raises(ValueError, match="recompute must be one of none, activations, all, got 'some'"):
            make(name, "some")
    with pytest.raises(ValueError, match=r"offsets must be int32 of shape \[4\]"):
        make()(rows(5)[0], torch.tensor([0, 5], dtype=torch.int32))
    for offsets in ([0, 3, 3, 4], [1, 3, 3, 5], [0, 4, 2, 5]):
        with pytest.raises(ValueError, match="offsets must run from 0 to the number of rows 5 and not decrease"):
            make()(rows(5)[0], torch.tensor(offsets, dtype=torch.int32))
