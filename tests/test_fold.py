"""From the second forward in attack_mode on batch norms are folded, to rounding; where they cannot be, exactly."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels.attacks import attack_mode
from moe_kernels.attacks.fold import Folds, _Fold
from moe_kernels.nn import ExpertBatchNorm2d, ExpertConv2d, ExpertResNet18
from moe_kernels.ops.winograd_conv2d import is_emulated
from moe_kernels.testing import Source
from moe_kernels.testing.networks import ResNet18, randomize_statistics


class Net(nn.Module):
    """A convolution and a batch norm in the hands of a function, which may count its calls."""

    def __init__(self, function: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.line, self.line_bn = nn.Conv1d(3, 8, 3, bias=False), nn.BatchNorm1d(8, affine=False)
        self.experts, self.expert_bn = ExpertConv2d(2, 3, 8, 3), ExpertBatchNorm2d(2, 8)
        nn.init.uniform_(self.expert_bn.running_var, 0.5, 1.5)
        self.function, self.calls = function, 0
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.function(self, x)


def keeps_the_convolution(net: Net, x: Tensor) -> Tensor:
    before, net.kept = net.kept, net.conv(x)
    y = net.bn(net.kept)
    return y if before is None else y + before.detach()


def from_the_third_call(use: Callable[[Net, Tensor], Tensor]) -> Callable[[Net, Tensor], Tensor]:
    """Plain at first, so that the batch norm is folded by then."""

    def function(net: Net, x: Tensor) -> Tensor:
        return use(net, x) if net.calls > 2 else net.bn(net.conv(x))

    return function


def both(net: Net, x: Tensor) -> Tensor:
    h = net.conv(x)
    return net.bn(h) * h


def used_after_another_call(net: Net, x: Tensor) -> Tensor:
    h = net.conv(x)
    return net.bn(h) + net.bn(net.conv(2 * x)) + h


def later_another_eps(net: Net, x: Tensor) -> Tensor:
    bn = net.bn
    return F.batch_norm(net.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1)


def grouped(net: Net, x: Tensor, rows: tuple[int, int] = (1, 1)) -> Tensor:
    offsets = Source(x.dtype).offsets((1, 1))
    h = net.experts(x, offsets)
    return net.expert_bn(h, offsets if rows == (1, 1) else Source(x.dtype).offsets(rows))


def changes_the_weight(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.conv.weight.mul_(1.1)
        net.bn.running_var.add_(0.1)
    return net.bn(net.conv(x))


def replaces_the_statistics(net: Net, x: Tensor) -> Tensor:
    net.bn.running_mean = net.bn.running_mean + 1
    return net.bn(net.conv(x))


def batch_statistics(net: Net, x: Tensor) -> Tensor:
    return F.batch_norm(net.conv(x), None, None, training=True)


def masked_through_a_view(net: Net, x: Tensor) -> Tensor:
    y = net.bn(net.conv(x))
    y.view(len(y), -1)[:, ::2] = 0
    return y


def changes_the_weight_unseen(net: Net, x: Tensor) -> Tensor:
    net.conv.weight.data.mul_(1.1)
    net.bn.running_mean.data.add_(0.1)
    return net.bn(net.conv(x))


def replaces_the_weight(net: Net, x: Tensor) -> Tensor:
    net.conv.weight.data = 1.1 * net.conv.weight
    return net.bn(net.conv(x))


def looks_without_grad(net: Net, x: Tensor) -> Tensor:
    h = net.conv(x)
    if net.calls == 3:
        with torch.no_grad():
            h.mean()
    return net.bn(h)


# name: (function, whether its batch norm is folded in the end)
FUNCTIONS: dict[str, tuple[Callable[[Net, Tensor], Tensor], bool]] = {
    "plain": (lambda net, x: net.bn(net.conv(x)).relu_(), True),
    "one dimension": (lambda net, x: net.line_bn(net.line(x.flatten(2))), True),
    "viewed": (lambda net, x: net.bn(net.conv(x)).view(len(x), -1), True),
    "a view of some channels": (lambda net, x: net.bn(net.conv(x))[:, :4].view(len(x), -1), True),
    "a view of pixels in a row": (lambda net, x: net.bn(net.conv(x)).flatten(2).view(len(x), -1), True),
    "strides of its own": (
        lambda net, x: torch.as_strided(input=net.bn(net.conv(x)), size=(2, 288), stride=(288, 1)).cumsum(1),
        True,
    ),
    "written to through a view": (masked_through_a_view, True),
    "calls itself twice": (lambda net, x: net.bn(net.conv(x)) + net.bn(net.conv(2 * x)), True),
    "grouped": (grouped, True),
    "grouped otherwise": (lambda net, x: grouped(net, x, (2, 0)), False),
    "of another dtype": (lambda net, x: net.bn.float()(net.conv.bfloat16()(x.bfloat16())).double(), False),
    "two norms in turn": (lambda net, x: (net.bn if net.calls % 2 else net.other)(net.conv(x)), False),
    "the result used twice": (both, False),
    "the result used after another call": (used_after_another_call, False),
    "in a list": (
        lambda net, x: net.bn(torch.cat([net.conv(x), x.mean(1, True)[:, :, 2:, 2:].expand(-1, 0, -1, -1)], 1)),
        False,
    ),
    "kept from the call before": (keeps_the_convolution, False),
    "later another norm": (from_the_third_call(lambda net, x: net.other(net.conv(x))), False),
    "later another eps": (from_the_third_call(later_another_eps), False),
    "later no norm": (from_the_third_call(lambda net, x: torch.cat([net.conv(x)], 1)), False),
    "later both": (from_the_third_call(both), False),
    "later written to": (from_the_third_call(lambda net, x: net.bn(net.conv(x).mul_(2))), False),
    "later new statistics": (from_the_third_call(replaces_the_statistics), False),
    "later a view of its own": (from_the_third_call(lambda net, x: net.conv(x).mT), False),
    "later batch statistics": (from_the_third_call(batch_statistics), False),
    "later looked at without grad": (looks_without_grad, False),
    "changed weights": (changes_the_weight, False),
    "weights changed through .data": (changes_the_weight_unseen, False),
    "weights replaced through .data": (replaces_the_weight, False),
}


def input_gradients(net: nn.Module, x: Tensor, steps: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    gradients = []
    for _ in range(steps):
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        gradients += [y.detach(), torch.autograd.grad((y * y.detach().cos()).sum(), leaf)[0]]
    return gradients


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_step_is_that_of_eager(name: str) -> None:
    function, folds = FUNCTIONS[name]
    torch.manual_seed(0)
    networks = [randomize_statistics(Net(function)).double().eval().requires_grad_(False) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    x = Source(torch.float64).rand(2, 3, 8, 8)
    expected = input_gradients(networks[0], x)
    with attack_mode(networks[1]):
        got = input_gradients(networks[1], x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert torch.equal(got[1], expected[1]) or name == "calls itself twice"
    assert torch.equal(got[-1], expected[-1]) != folds


def test_what_a_hook_keeps_is_the_convolutions_result() -> None:
    net = Net(lambda net, x: net.bn(net.conv(x))).eval()
    x, kept = Source(torch.float32).rand(2, 3, 8, 8), []
    net.conv.register_forward_hook(lambda module, inputs, y: kept.append(y) if net.calls == 3 else None)
    with attack_mode(net):
        input_gradients(net, x, 3)
    assert torch.equal(kept[0], net.conv(x))


def test_gradients_have_the_layout_of_eager() -> None:
    net = randomize_statistics(ResNet18(width=4)).eval()
    x = Source(torch.float32).rand(2, 3, 32, 32)
    with attack_mode(net):
        *_, gradient = input_gradients(net, x, 2)
    assert gradient.is_contiguous()


def test_a_folded_resnet_has_the_signs_of_eager() -> None:
    net = randomize_statistics(ResNet18(width=8)).double().eval()
    x = Source(torch.float64).rand(2, 3, 32, 32)
    state = {name: t.clone() for name, t in net.state_dict().items()}
    _, _, _, expected = input_gradients(net, x, 2)
    with attack_mode(net):
        _, first, _, second = input_gradients(net, x, 2)
    assert torch.equal(first, expected) and not torch.equal(second, expected)
    torch.testing.assert_close(second, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(second.sign(), expected.sign())
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())


def error(x: Tensor, exact: Tensor) -> float:
    return (x - exact).abs().mean().div(exact.abs().mean()).item()


def wrong_signs(x: Tensor, exact: Tensor) -> int:
    return int((x.sign() != exact.sign()).sum())


def test_by_winograds_algorithm_the_gradient_has_the_error_and_the_signs_of_eager() -> None:
    net = randomize_statistics(ResNet18(width=16)).eval().requires_grad_(False)
    x = Source(torch.float32).rand(3, 3, 32, 32)
    *_, eager = input_gradients(net, x, 2)
    with attack_mode(net):
        *_, folded = input_gradients(net, x, 2)
    *_, exact = input_gradients(net.double(), x.double(), 2)
    assert not torch.equal(folded, eager)
    assert error(folded, exact) < 10 * error(eager, exact) < 1e-3
    assert wrong_signs(folded, exact) <= wrong_signs(eager, exact) + 1e-4 * exact.numel()


@pytest.mark.parametrize("options", [{"padding": 2, "dilation": 2}, {"padding": 1, "groups": 2}], ids=str)
def test_dilated_and_grouped_convolutions_are_folded_without_winograds_algorithm(options: dict[str, int]) -> None:
    net = randomize_statistics(nn.Sequential(nn.Conv2d(32, 32, 3, **options), nn.BatchNorm2d(32))).eval()
    x = Source(torch.float32).rand(2, 32, 8, 8)
    *_, eager = input_gradients(net, x, 2)
    with attack_mode(net):
        *_, folded = input_gradients(net, x, 2)
    assert not torch.equal(folded, eager)
    torch.testing.assert_close(folded, eager)


@pytest.mark.parametrize("dtype, width", [(torch.float64, 4), (torch.float32, 16)], ids=["direct", "winograd"])
def test_grouped_networks_are_folded(dtype: torch.dtype, width: int) -> None:
    s = Source(dtype)
    x, offsets = s.rand(5, 3, 32, 32), s.offsets((2, 0, 3))
    experts = ExpertResNet18(3, width=width).eval()
    for norm in experts.modules():
        if isinstance(norm, ExpertBatchNorm2d):
            for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                assert t is not None
                t.data.uniform_(0.5, 1.5)
    net = Net(lambda net, x: experts(x, offsets)).to(dtype)
    net.experts = experts.to(dtype)
    with attack_mode(net):
        _, first = input_gradients(net, x, 1)
        with torch.profiler.profile() as profile:
            _, second = input_gradients(net, x, 1)
    _, eager = input_gradients(net, x, 1)
    _, exact = input_gradients(net.double(), x.double(), 1)
    assert torch.equal(first, eager)
    assert not any("batch_norm" in event.key for event in profile.key_averages())
    assert error(second, exact) < (1e-11 if dtype == torch.float64 else 2 * error(eager, exact))


def test_folded_weights_live_no_longer_than_the_mode() -> None:
    net, x = randomize_statistics(ResNet18(width=4)).eval(), Source(torch.float32).rand(2, 3, 32, 32)
    gc.collect()
    gc.disable()
    try:
        with attack_mode(net):
            input_gradients(net, x, 3)
        assert not any(type(o) in (Folds, _Fold) for o in gc.get_objects())
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [4, 16])
def test_under_autocast_folds_where_16_bits_are_emulated(width: int, dtype: torch.dtype) -> None:
    net = randomize_statistics(ResNet18(width=width)).eval().requires_grad_(False).to(dtype)
    x = Source(dtype).rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        *_, eager = input_gradients(net, x, 2)
        with attack_mode(net):
            *_, folded = input_gradients(net, x, 2)
        folds = is_emulated(x)
    *_, exact = input_gradients(net.double(), x.double(), 2)
    assert torch.equal(folded, eager) != folds
    assert error(folded, exact) <= 1.5 * error(eager, exact)
