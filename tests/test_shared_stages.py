"""A trunk shared by all experts, followed by the experts, equals plain ResNet-18s that share their first layers."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import ExpertResNet18, ResNet18Trunk, RobustMoE, attack_mode
from moe_kernels.testing import Source
from moe_kernels.testing.networks import ResNet18, randomize_statistics
from moe_kernels.testing.saved import saved_bytes

COUNTS = (3, 0, 2)
OFFSETS = Source(torch.float32).offsets(COUNTS)
FIRST = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")  # of the plain network; stage S ends at FIRST[S + 1]


def plain_networks(shared_stages: int, **kinds: torch.dtype) -> list[ResNet18]:
    """One network per expert; their stem and first stages are the same modules."""
    nets = [ResNet18(7, 2, 4).to(**kinds) for _ in COUNTS]
    for net, name in itertools.product(nets, FIRST[: shared_stages + 2]):
        setattr(net, name, getattr(nets[0], name))
    for net in nets:
        randomize_statistics(net)
    return nets


def trunk_and_experts(
    plain: list[ResNet18], shared_stages: int, dtype: torch.dtype = torch.float64, recompute: str = "activations"
) -> tuple[ResNet18Trunk, ExpertResNet18]:
    trunk = ResNet18Trunk(shared_stages, 2, 4, dtype=dtype, recompute=recompute)
    experts = ExpertResNet18(3, 7, 2, 4, dtype=dtype, recompute=recompute, shared_stages=shared_stages)
    trunk.load_state_dicts([{name: t for name, t in plain[0].state_dict().items() if name in trunk.state_dict()}])
    own = experts.state_dict().keys()
    experts.load_state_dicts([{name: t for name, t in net.state_dict().items() if name in own} for net in plain])
    return trunk, experts


def plain_forward(plain: list[ResNet18], x: Tensor, shared_stages: int) -> Tensor:
    h = F.relu(plain[0].bn1(plain[0].conv1(x)))
    for name in FIRST[2 : shared_stages + 2]:
        h = getattr(plain[0], name)(h)
    logits = []
    for net, rows in zip(plain, h.split(COUNTS), strict=True):
        if len(rows):
            for name in FIRST[shared_stages + 2 :]:
                rows = getattr(net, name)(rows)
            logits.append(net.linear(rows.mean((2, 3))))
    return torch.cat(logits)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shared_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("recompute", ["none", "activations", "all"])
def test_equals_a_loop_over_plain_networks(shared_stages: int, recompute: str, training: bool) -> None:
    plain = plain_networks(shared_stages, dtype=torch.float64)
    trunk, experts = (net.train(training) for net in trunk_and_experts(plain, shared_stages, recompute=recompute))
    for net in plain:
        net.train(training)
    x = torch.randn(5, 2, 16, 16, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [experts(trunk(inputs[0]), OFFSETS), plain_forward(plain, inputs[1], shared_stages)]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for name, parameter in trunk.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[0].get_parameter(name).grad[None])
    for name, parameter in experts.named_parameters():
        grads = [net.get_parameter(name).grad for net in plain]
        torch.testing.assert_close(
            parameter.grad, torch.stack([torch.zeros_like(grads[0]) if g is None else g for g in grads])
        )
    after = dict(plain[0].state_dict())
    torch.testing.assert_close(trunk.state_dicts()[0], {name: after[name] for name in trunk.state_dict()})


def test_without_shared_stages_it_is_the_whole_network() -> None:
    assert (
        ExpertResNet18(2, width=2, shared_stages=0).state_dict().keys()
        == ExpertResNet18(2, width=2).state_dict().keys()
    )
    names = [
        {*ResNet18Trunk(s, width=2).state_dict(), *ExpertResNet18(2, width=2, shared_stages=s).state_dict()}
        for s in (1, 4)
    ]
    assert names == [set(ResNet18(width=2).state_dict())] * 2


def test_a_step_saves_less_and_gives_the_same_bits() -> None:
    found, kept = [], []
    for recompute in ("none", "activations", "all"):
        torch.manual_seed(0)
        trunk, x = ResNet18Trunk(2, 2, 4, recompute=recompute), torch.rand(5, 2, 16, 16).requires_grad_()
        kept.append(saved_bytes(lambda trunk=trunk, x=x: trunk(x)))
        trunk(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in trunk.parameters())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert kept[0] > kept[1] > kept[2]


def test_a_mixture_under_attack_mode() -> None:
    """The images' gradient, through the routes and the experts, is the same in attack mode as outside."""
    trunk = randomize_statistics(ResNet18Trunk(1, 2, 4).double()).eval()
    router = nn.Sequential(nn.Flatten(), nn.Linear(4 * 8 * 8, 3)).double()
    experts = randomize_statistics(ExpertResNet18(3, 7, 2, 4, shared_stages=1).double()).eval()
    moe = RobustMoE.from_experts(experts, router)
    whole = nn.Sequential(trunk, moe)
    x = torch.rand(5, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(whole(x).square().sum(), x)
    with attack_mode(whole):
        (gradient,) = torch.autograd.grad(whole(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_no_images() -> None:
    assert ResNet18Trunk(2, 2, 4)(torch.rand(0, 2, 8, 8)).shape == (0, 8, 4, 4)


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(ValueError, match="shared_stages must be a whole number from 1 to 4, got 0"):
        ResNet18Trunk(0)
    with pytest.raises(ValueError, match="shared_stages must be a whole number from 0 to 4, got 5"):
        ExpertResNet18(2, shared_stages=5)
    with pytest.raises(ValueError, match=r"shared_stages must be a whole number from 0 to 4, got 1\.0"):
        ExpertResNet18(2, shared_stages=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="recompute must be one of none, activations, all, got 'some'"):
        ResNet18Trunk(recompute="some")
    with pytest.raises(ValueError, match=r"x must have 4 dimensions, got shape \[2, 8, 8\]"):
        ResNet18Trunk(1, 2, 4)(torch.rand(2, 8, 8))
