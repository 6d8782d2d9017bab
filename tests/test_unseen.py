"""What a model sees of its own tensors in attack_mode differs from eager only by rounding, from the first step on."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels.attacks import attack_mode, rules
from moe_kernels.testing import Source
from moe_kernels.testing.networks import ResNet18, randomize_statistics


@pytest.fixture(autouse=True)
def rules_for_few_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MIN_ELEMENTS", 0)
    monkeypatch.setattr(rules, "MIN_PRODUCTS", 0)


class Net(nn.Module):
    """A convolution that Winograd's algorithm computes and a batch norm, which a function uses."""

    def __init__(self, function: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.function, self.calls = function, 0
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.function(self, x)


def keeps_the_convolution(net: Net, x: Tensor) -> Tensor:
    before, net.kept = net.kept, net.conv(x)
    y = net.bn(net.kept)
    return y if before is None else y + before.detach()


def both(net: Net, x: Tensor) -> Tensor:
    h = net.conv(x)
    return net.bn(h) * h


def masked_through_a_view(net: Net, x: Tensor) -> Tensor:
    y = net.bn(net.conv(x))
    y.view(len(y), -1)[:, ::2] = 0
    return y


def changes_the_weight(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.conv.weight.mul_(1.1)
        net.bn.running_var.add_(0.1)
    return net.bn(net.conv(x))


def changes_the_weight_unseen(net: Net, x: Tensor) -> Tensor:
    net.conv.weight.data.mul_(1.1)
    net.bn.running_mean.data.add_(0.1)
    return net.bn(net.conv(x))


def replaces_the_weight(net: Net, x: Tensor) -> Tensor:
    net.conv.weight.data = 1.1 * net.conv.weight
    net.bn.running_mean = net.bn.running_mean + 1
    return net.bn(net.conv(x))


def looks_without_grad(net: Net, x: Tensor) -> Tensor:
    h = net.conv(x)
    with torch.no_grad():
        h.mean()
    return net.bn(h)


@torch.jit.script
def scripted_view(x: Tensor) -> Tensor:
    return x.view(x.size(0), -1) * x.stride(1)


def in_another_thread(net: Net, x: Tensor) -> Tensor:
    h, out = net.conv(x), []
    thread = threading.Thread(target=lambda: out.append(net.bn(h).relu().view(len(x), -1)))
    thread.start()
    thread.join()
    return out[0]


FUNCTIONS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "plain": lambda net, x: net.bn(net.conv(x)).relu_(),
    "viewed": lambda net, x: net.bn(net.conv(x)).view(len(x), -1),
    "a view of some channels": lambda net, x: net.bn(net.conv(x))[:, :4].view(len(x), -1),
    "a view of pixels in a row": lambda net, x: net.bn(net.conv(x)).flatten(2).view(len(x), -1),
    "strides of its own": lambda net, x: net.bn(net.conv(x)).as_strided((2, 288), (1024, 1)).cumsum(1),
    "written to through a view": masked_through_a_view,
    "in place on a view": lambda net, x: F.relu_(net.bn(net.conv(x))[:, 2:]),
    "calls itself twice": lambda net, x: net.bn(net.conv(x)) + net.bn(net.conv(2 * x)),
    "the result used twice": both,
    "another eps": lambda net, x: F.batch_norm(net.conv(x), net.bn.running_mean, net.bn.running_var, eps=1),
    "batch statistics": lambda net, x: F.batch_norm(net.conv(x), None, None, training=True),
    "two norms in turn": lambda net, x: (net.bn if net.calls % 2 else net.other)(net.conv(x)),
    "without a norm": lambda net, x: torch.cat([net.conv(x), x], 1).mT,
    "written to": lambda net, x: net.bn(net.conv(x).mul_(2)),
    "kept from the call before": keeps_the_convolution,
    "looked at without grad": looks_without_grad,
    "changed weights": changes_the_weight,
    "weights changed through .data": changes_the_weight_unseen,
    "weights replaced": replaces_the_weight,
    "a channels-last weight": lambda net, x: net.bn(
        F.conv2d(x, net.conv.weight.contiguous(memory_format=torch.channels_last), padding=1)
    ),
    "a transposed weight": lambda net, x: F.conv2d(x, net.conv.weight.mT, net.conv.bias, padding="same"),
    "a strided input": lambda net, x: net.conv(x[:, :, 1:, ::2]),
    "a transposed input": lambda net, x: net.conv(x.mT),
    "an expanded gradient": lambda net, x: net.conv(x).sum((2, 3)),
    "TorchScript": lambda net, x: scripted_view(net.bn(net.conv(x))),
    "another thread": in_another_thread,
}


def steps(net: Net, x: Tensor) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """Results and input gradients of three steps, and the strides of everything that modules return."""
    torch.manual_seed(0)
    found, strides = [], []
    hooks = [m.register_forward_hook(lambda m, i, y: strides.append(y.stride())) for m in net.modules()]
    for _ in range(3):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = net(leaf)
        grad = torch.autograd.grad((y * y.detach().cos()).sum(), leaf)[0]
        found += [y.detach(), grad]
        strides.append(grad.stride())
    for hook in hooks:
        hook.remove()
    return found, strides


def error(x: Tensor, exact: Tensor) -> float:
    return (x - exact).abs().mean().div(exact.abs().mean()).item()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_step_equals_eager(name: str, layout: torch.memory_format) -> None:
    function = FUNCTIONS[name]
    torch.manual_seed(0)
    nets = [randomize_statistics(Net(function)).eval().requires_grad_(False) for _ in range(3)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    x = Source(torch.float32).rand(3, 16, 8, 8).contiguous(memory_format=layout)
    if layout == torch.channels_last and ("view" in name or name in ("TorchScript", "another thread")):
        return  # eager torch refuses it, too
    eager, strides = steps(nets[0], x)
    exact, _ = steps(nets[1].double(), x.double())
    with attack_mode(nets[2]):
        got, seen = steps(nets[2], x)
    assert seen == strides
    for ours, theirs, truth in zip(got, eager, exact, strict=True):
        assert error(ours, truth) <= 10 * error(theirs, truth) + 1e-6


def test_large_convolutions_use_winograds_algorithm_from_the_first_step() -> None:
    net, x = Net(lambda net, x: net.conv(x)).requires_grad_(False), Source(torch.float32).rand(3, 16, 8, 8)
    eager, _ = steps(net, x)
    with attack_mode(net), torch.profiler.profile() as profile:
        got, _ = steps(net, x)
    assert not torch.equal(got[0], eager[0]) and not torch.equal(got[1], eager[1])
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["moe_kernels::winograd_conv2d"] == 6 and "aten::convolution" not in counts


def wrong_signs(x: Tensor, exact: Tensor) -> int:
    return int((x.sign() != exact.sign()).sum())


def test_winograds_gradient_has_the_error_and_the_signs_of_eager() -> None:
    net = randomize_statistics(ResNet18(width=16)).eval().requires_grad_(False)
    x = Source(torch.float32).rand(3, 3, 32, 32)
    eager = steps(net, x)[0][-1]
    with attack_mode(net):
        ours = steps(net, x)[0][-1]
    exact = steps(net.double(), x.double())[0][-1]
    assert not torch.equal(ours, eager)
    assert error(ours, exact) < 10 * error(eager, exact) < 1e-3
    assert wrong_signs(ours, exact) <= wrong_signs(eager, exact) + 1e-4 * exact.numel()


def test_second_derivatives_through_winograds_algorithm() -> None:
    net, x = Net(lambda net, x: net.conv(x)).requires_grad_(False), Source(torch.float32).rand(3, 16, 8, 8)

    def second(net: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(net(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    with attack_mode(net):
        ours = second(net, x)
    eager, exact = second(net, x), second(net.double(), x.double())
    assert not torch.equal(ours, eager) and error(ours, exact) < 10 * error(eager, exact)


@pytest.mark.parametrize("bad", ["channels", "bias", "dtype", "leaf"])
def test_what_torch_refuses_is_refused_with_its_message(bad: str) -> None:
    x, weight = torch.rand(2, 16, 8, 8, requires_grad=True), torch.rand(16, 16, 3, 3)
    calls: dict[str, Callable[[], Tensor]] = {
        "channels": lambda: F.conv2d(x, weight[:, :15].repeat(1, 2, 1, 1)),
        "bias": lambda: F.conv2d(x, weight, torch.rand(15)),
        "dtype": lambda: F.conv2d(x, weight, torch.rand(16, dtype=torch.float64)),
        "leaf": lambda: F.relu(x, inplace=True),
    }
    with pytest.raises(RuntimeError) as eager:
        calls[bad]()
    before = x.detach().clone()
    with attack_mode(torch.sin), pytest.raises(RuntimeError) as ours:
        calls[bad]()
    assert str(ours.value) == str(eager.value) and torch.equal(x, before)


@pytest.mark.parametrize("width", [4, 16])
def test_emulated_16_bit_dtypes_are_computed_in_fp32_by_autocast(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "is_emulated", lambda x: True)
    net = randomize_statistics(ResNet18(width=width)).eval().requires_grad_(False)
    x = Source(torch.float32).rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        eager = steps(net, x)[0][-1]
        with attack_mode(net):
            ours = steps(net, x)[0][-1]
    exact = steps(net.double(), x.double())[0][-1]
    assert not torch.equal(ours, eager) and error(ours, exact) <= 1.5 * error(eager, exact)
