"""Inside attack_mode a forward saves little, and the input gradient equals torch's to the bit, apart from large
convolutions."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moe_kernels import ExpertResNet18, ExpertViT
from moe_kernels.attacks import attack_mode, rules
from moe_kernels.testing import Source
from moe_kernels.testing.networks import PreActResNet, ResNet18, ViT, randomize_statistics
from moe_kernels.testing.saved import saved_bytes

S = Source(torch.float32)
PREACT18 = ((64, 2), (128, 2), (256, 2), (512, 2))
WRN_28_10 = ((160, 4), (320, 4), (640, 4))


class DecoderNet(nn.Module):
    """Transposed, grouped, dilated and strided convolutions, every pooling, and ReLUs of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3),
            nn.BatchNorm2d(8, affine=False),
            nn.ReLU6(inplace=True),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4),
            nn.LeakyReLU(0.1, inplace=True),
            nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1),
            nn.GroupNorm(2, 6),
            nn.Hardtanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 6, 3, padding="same"),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d((3, 2)),
            nn.Flatten(),
            nn.Linear(36, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Alone(nn.Module):
    """A grouped network of one expert as an ordinary network."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, torch.tensor([0, len(x)], dtype=torch.int32))


@pytest.fixture(autouse=True)
def rules_for_few_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MIN_ELEMENTS", 0)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet18(width=8),
    "preact": lambda: PreActResNet(((8, 2), (16, 2)), 8),
    "vit": lambda: ViT(32, 8, 32, 2, 2),
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10)),
    "decoder": DecoderNet,
    "experts": lambda: Alone(ExpertResNet18(1, width=4)),
    "expert vit": lambda: Alone(ExpertViT(1, image_size=32, patch=8, width=32, depth=2, heads=2)),
}


def input_gradient(function: Callable[[Tensor], Tensor], x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, weights.to(y.dtype))[0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("recompute", ["none", "activations"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_eager_bitwise(name: str, recompute: str, autocast: bool, layout: torch.memory_format) -> None:
    net = randomize_statistics(NETWORKS[name]()).eval().requires_grad_(False)
    x, weights = S.rand(2, 3, 32, 32).contiguous(memory_format=layout), S.randn(2, 10)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = input_gradient(net, x, weights)
        with attack_mode(net, recompute):
            got = input_gradient(net, x, weights)
            with torch.no_grad():
                inference = net(x)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    torch.testing.assert_close(inference, got[0])


@pytest.mark.parametrize(
    ("net", "size", "eager", "lean"),
    [
        (lambda: ResNet18(), 32, 4_700_160, 69_632),  # one bit for each of the 557 056 ReLUs
        (lambda: PreActResNet(PREACT18, 64), 32, 4_470_784, 69_632),
        (lambda: PreActResNet(WRN_28_10, 16), 32, 18_496_000, 288_768),
        (lambda: Alone(ExpertResNet18(1)), 32, 2_279_428, 69_636),
        (lambda: ViT(32, 4, 64, 2, 4), 32, 582_728, 87_880),
        (lambda: Alone(ExpertViT(1, image_size=32, patch=4, width=64, depth=2, heads=4)), 32, 633_964, 89_708),
        (lambda: ViT(), 224, 59_401_096, 7_660_936),
    ],
    ids=["resnet-18", "preact-resnet-18", "wrn-28-10", "expert-resnet-18", "vit", "expert-vit", "vit-s-16"],
)
def test_saved_bytes(net: Callable[[], nn.Module], size: int, eager: int, lean: int) -> None:
    model, images = net().eval(), 2
    x = S.rand(images, 3, size, size).requires_grad_()
    before = saved_bytes(lambda: model(x), apart_from=model)
    with attack_mode(model, "activations"):
        after = saved_bytes(lambda: model(x), apart_from=model)
    assert (before, after) == (images * eager, images * lean)


@pytest.mark.parametrize(
    ("net", "eager", "lean", "copies"),
    [
        (lambda: ResNet18(width=16), 592_128, 17_408, 0),
        (lambda: Alone(ExpertResNet18(1, width=16)), 310_528, 17_408, 1_398_120),
        (lambda: ViT(32, 4, 64, 2, 4), 327_112, 71_240, 0),
        (lambda: Alone(ExpertViT(1, image_size=32, patch=4, width=64, depth=2, heads=4)), 318_004, 45_876, 206_152),
    ],
    ids=["resnet-18", "expert-resnet-18", "vit", "expert-vit"],
)
def test_saved_bytes_under_autocast(net: Callable[[], nn.Module], eager: int, lean: int, copies: int) -> None:
    """Bytes per image; attack_mode also saves copies of the weights in 16 bits, and the offsets."""
    model = net().eval()

    def kept(images: int, mode: AbstractContextManager[None]) -> int:
        x = S.rand(images, 3, 32, 32).requires_grad_()
        with mode, torch.autocast("cpu", torch.bfloat16):
            return saved_bytes(lambda: model(x), apart_from=model)

    assert kept(2, nullcontext()) - kept(1, nullcontext()) == eager
    assert [kept(images, attack_mode(model, "activations")) for images in (1, 2)] == [copies + lean, copies + 2 * lean]


IMAGE, CONV, TRANSPOSED = S.randn(2, 4, 9, 8), S.randn(6, 2, 3, 3), S.randn(4, 3, 3, 3)
OPERATIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "grouped conv": (lambda x: F.conv2d(x, CONV, S.randn(6), (2, 1), 1, groups=2), 0),
    "conv padded to the same": (lambda x: F.conv2d(x, CONV[:, :, :, :2], padding="same", dilation=2, groups=2), 0),
    "conv not padded": (lambda x: F.conv2d(x, CONV, padding="valid", groups=2), 0),
    "conv1d": (lambda x: torch.conv1d(x.flatten(2), CONV[:, :, 0], dilation=2, groups=2), 0),
    "conv3d": (lambda x: F.conv3d(x[:, None], CONV[:, :1, None]), 0),
    "transposed conv": (lambda x: F.conv_transpose2d(x, TRANSPOSED, None, 2, 1, 1, 2), 0),
    "relu": (torch.relu, 72),
    "Tensor.relu": (Tensor.relu, 72),
    "relu_": (lambda x: torch.relu_(x * 1), 72),
    "relu of a transpose": (lambda x: F.relu(x.mT * 1, True), 72),
    "relu6": (lambda x: F.relu6(3 * x), 72),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.3), 72),
    "leaky_relu_": (lambda x: F.leaky_relu_(x * 1, 0.3), 72),
    "hardtanh_": (lambda x: F.hardtanh_(x * 1, -0.5, 0.2), 72),
    "hardtanh in place": (lambda x: F.hardtanh(x * 1, -0.5, 0.2, inplace=True), 72),
    "max_pool1d": (lambda x: F.max_pool1d(x.flatten(2), 3, 2, 1, 2, True), 2 * 288),
    "max_pool1d of its own stride": (lambda x: torch.max_pool1d(x.flatten(2), 3, []), 2 * 192),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), 2 * 160),
    "max_pool2d of many pixels": (lambda x: F.max_pool2d(F.pad(x, (174, 0, 173, 0)), 2), 2 * 4 * 4 * 91 * 91),
    "max_pool3d": (lambda x: F.max_pool3d(x[:, None], (2, 3, 2), ceil_mode=True), 2 * 48),
    "adaptive max 1d": (lambda x: F.adaptive_max_pool1d(x.flatten(2), 5), 2 * 40),
    "adaptive max": (lambda x: F.adaptive_max_pool2d(x, (None, 3)), 2 * 216),
    "adaptive max 3d": (lambda x: F.adaptive_max_pool3d(x[:, None], (3, 2, 4)), 2 * 48),
    "avg_pool1d": (lambda x: F.avg_pool1d(x.flatten(2), 3, 2, 1, True, False), 0),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False), 0),
    "avg_pool3d": (lambda x: F.avg_pool3d(x[:, None], 2), 0),
    "adaptive 1d": (lambda x: F.adaptive_avg_pool1d(x.flatten(2), 5), 0),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, (None, 3)), 0),
    "adaptive 3d": (lambda x: F.adaptive_avg_pool3d(x[:, None], 2), 0),
    "batch_norm": (lambda x: F.batch_norm(x, IMAGE[0, :, 0, 0], IMAGE[0, :, 0, 1].abs()), 4 * 4),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_equals_torchs(name: str) -> None:
    function, most = OPERATIONS[name]
    x = IMAGE.clone().requires_grad_()
    frozen = nn.ParameterList([CONV, TRANSPOSED, IMAGE]).requires_grad_(False)
    state = torch.get_rng_state()
    S.generator.manual_seed(3)
    y = function(x)
    grad = torch.randn_like(y).requires_grad_()
    (dx,) = torch.autograd.grad(y, x, grad, create_graph=True)
    (ddgrad,) = torch.autograd.grad(dx, grad, IMAGE)
    with attack_mode(frozen):
        S.generator.manual_seed(3)
        lean = function(x)
        assert saved_bytes(lambda: function(x), apart_from=frozen) <= most
        (lean_dx,) = torch.autograd.grad(lean, x, grad, create_graph=True)
        (lean_ddgrad,) = torch.autograd.grad(lean_dx, grad, IMAGE)
    assert lean.stride() == y.stride() and torch.equal(lean, y)
    assert torch.equal(lean_dx, dx)
    torch.testing.assert_close(lean_ddgrad, ddgrad)  # torch's double backward of batch norm rounds differently
    torch.set_rng_state(state)


def test_special_values_pass_as_in_torch() -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 6.0, -1.0, 1.0])
    grad = torch.tensor([1.0, 2.0, float("nan"), 3.0, 4.0, 5.0, float("inf"), float("nan")])
    for function in (F.relu, F.relu6, F.hardtanh, F.leaky_relu):
        expected = input_gradient(function, values, grad)
        with attack_mode(function):
            got = input_gradient(function, values, grad)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last_3d", "transposed"])
@pytest.mark.parametrize("inplace", [False, True])
def test_activations_return_what_torchs_do_in_any_layout(layout: str, inplace: bool) -> None:
    shapes = {"channels_last_3d": (2, 4, 8, 64, 66), "transposed": (512, 520)}
    x = S.randn(*shapes.get(layout, (8, 4, 64, 130)))
    if layout in ("channels_last", "channels_last_3d"):
        x = x.contiguous(memory_format=getattr(torch, layout))
    x = (x.mT if layout == "transposed" else x).requires_grad_()
    for function in (F.relu, F.relu6, F.hardtanh, F.leaky_relu):

        def run(function: Callable[..., Tensor] = function) -> tuple[Any, ...]:
            h = x * 1
            y = function(h, inplace=inplace)
            seen: list[Tensor] = []
            y.register_hook(seen.append)
            (dx,) = torch.autograd.grad((h * 2).sum() + y.sum(), x)
            return y is h, y._is_view(), h._version, len(seen), y.stride(), y.detach(), dx

        expected = run()
        with attack_mode(function):
            got = run()
        assert got[:5] == expected[:5]
        assert torch.equal(got[5], expected[5]) and torch.equal(got[6], expected[6])


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.hardtanh(x, 1.0, -1.0),
        lambda x: F.hardtanh_(x * 1, 1.0, -1.0),
        lambda x: F.hardtanh(x, -1.0, None),
        lambda x: F.hardtanh(x, float("nan"), 1.0),
        lambda x: F.hardtanh(x, -1e300, 1e300),
        lambda x: F.hardtanh(x, torch.tensor([-1.0]), torch.tensor([1.0])),
        lambda x: F.leaky_relu(x, None),
        lambda x: F.leaky_relu(x, "a"),
        lambda x: F.leaky_relu(x, -0.5),
    ],
)
def test_bounds_that_torch_refuses_are_left_to_it(call: Callable[[Tensor], Tensor]) -> None:
    x = S.randn(512, 520).requires_grad_()

    def run() -> Any:
        try:
            return call(x).detach().nan_to_num(7).tolist()
        except (TypeError, ValueError, RuntimeError) as error:
            return type(error), str(error)

    expected = run()
    with attack_mode(call):
        assert run() == expected


def test_inplace_relu_is_seen_by_other_readers() -> None:
    x = IMAGE.clone().requires_grad_()

    def function(x: Tensor) -> Tensor:
        h = 2 * x
        y = F.relu(h[:, 1:3], inplace=True)
        return 3 * h * y.mean()

    expected = torch.autograd.grad(function(x).square().sum(), x)[0]
    with attack_mode(function):
        assert torch.equal(torch.autograd.grad(function(x).square().sum(), x)[0], expected)
        with pytest.raises(RuntimeError, match="leaf"):
            F.relu(x, inplace=True)


def test_trainable_parameters_inside_get_their_gradients() -> None:
    net, other = ResNet18(width=4), ResNet18(width=4)
    x = S.rand(2, 3, 32, 32).requires_grad_()
    other(x).sum().backward()
    expected = [p.grad.clone() for p in other.parameters()]
    other.zero_grad()
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    with attack_mode(net):
        other(x).sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(other.parameters(), expected, strict=True))


def test_unusual_calls_are_left_to_torch() -> None:
    weight = S.randn(4, 4, 3, 3)

    def function(x: Tensor) -> Tensor:
        h = F.conv2d(x, weight[:, :, :2, :2], padding="same")
        h = h + checkpoint(lambda h: F.relu(F.conv2d(h, weight, padding=1)), h, use_reentrant=False)
        h = h + torch.func.vmap(lambda image: F.relu(F.conv2d(image[None], weight, padding=1)[0]))(h)
        with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            h = h + F.gelu(F.layer_norm(h, (8,)))
        h, indices = F.max_pool2d(h, 2, return_indices=True)
        return h + indices + torch.view_as_real(torch.conv2d(h.cfloat(), weight.cfloat())).mean()

    x = S.randn(2, 4, 8, 8)
    expected = input_gradient(function, x, torch.ones(2, 4, 4, 4))
    with attack_mode(function):
        got = input_gradient(function, x, torch.ones(2, 4, 4, 4))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def under_builtin_hooks(x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, Tensor.clone):
        return F.relu(F.conv2d(x, CONV, groups=2))


def in_forward_mode(x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        y = F.relu(F.conv2d(forward_ad.make_dual(x, torch.ones_like(x)), CONV, groups=2))
        return torch.cat([y, forward_ad.unpack_dual(y).tangent])


def of_numpys_integers(x: Tensor) -> Tensor:
    one, two = np.int64(1), np.int64(2)
    return F.avg_pool2d(F.max_pool2d(F.conv2d(x, CONV, None, one, one, groups=2), two), two, one)


def to_a_number(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(x.flatten(1), IMAGE[0].flatten())


@pytest.mark.parametrize("function", [under_builtin_hooks, in_forward_mode, of_numpys_integers, to_a_number])
def test_whatever_torch_allows_works_inside(function: Callable[[Tensor], Tensor]) -> None:
    x = IMAGE.clone().requires_grad_()
    expected = torch.autograd.grad(function(x).sum(), x)
    with attack_mode(function):
        assert torch.equal(torch.autograd.grad(function(x).sum(), x)[0], expected[0])


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize(
    "sizes", [{"stride": 0}, {"stride": [-1]}, {"padding": -1}, {"dilation": 0}, {"stride": (1,) * 4}, {"groups": 0}]
)
def test_what_torch_refuses_is_refused_in_its_words(
    sizes: dict[str, int | Sequence[int]], dimensions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, x, weight = convolution(dimensions, monkeypatch)
    with pytest.raises(RuntimeError) as eager:
        function(x, weight, **sizes)
    with attack_mode(function), pytest.raises(RuntimeError) as lean:
        function(x, weight, **sizes)
    assert str(lean.value) == str(eager.value)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("sizes", [{"stride": [1], "padding": (1,)}, {"stride": (2,)}, {"dilation": [2]}])
def test_a_list_of_one_size_stands_for_all(
    sizes: dict[str, Sequence[int]], dimensions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, x, weight = convolution(dimensions, monkeypatch)
    expected = function(x, weight, **sizes)
    with attack_mode(function):
        torch.testing.assert_close(function(x, weight, **sizes), expected, rtol=1e-4, atol=1e-4)


def convolution(dimensions: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    """One that is Winograd's where it has two dimensions, with its image and its weight."""
    monkeypatch.setattr(rules, "MIN_PRODUCTS", 0)
    weight, x = S.randn(16, 16, *[3] * dimensions), S.randn(2, 16, *[16] * dimensions)
    return [F.conv1d, F.conv2d, F.conv3d][dimensions - 1], x.requires_grad_(), weight


def test_torch_compile_inside() -> None:
    net = randomize_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).eval()
    compiled = torch.compile(net, backend="aot_eager")
    x, weights = S.rand(2, 3, 8, 8), S.randn(2, 4, 6, 6)
    with attack_mode(net):
        torch.testing.assert_close(input_gradient(compiled, x, weights), input_gradient(net, x, weights))


def test_a_second_backward_works_and_a_changed_weight_is_an_error() -> None:
    net = nn.Conv2d(3, 4, 3)
    x = S.randn(2, 3, 8, 8).requires_grad_()
    with attack_mode(net):
        y = net(x).sum()
        first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        net.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_saves_no_more_than_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even without recomputing, and although small operations are left to torch."""
    monkeypatch.undo()
    net = NETWORKS[name]().eval()
    for images in (1, 2, 32):
        x = S.rand(images, 3, 32, 32).requires_grad_()
        net.requires_grad_(False)
        eager = saved_bytes(lambda x=x: net(x), apart_from=net)
        with attack_mode(net):
            assert saved_bytes(lambda x=x: net(x), apart_from=net) <= eager


def test_a_large_batch_saves_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    net, x = ResNet18().eval(), S.rand(32, 3, 32, 32).requires_grad_()
    with attack_mode(net):
        assert saved_bytes(lambda: net(x), apart_from=net) == 32 * 69_632


@pytest.mark.parametrize("calls", [F.relu, lambda x: F.conv2d(x, CONV, groups=2)])
def test_few_elements_are_left_to_torch(calls: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    x = IMAGE.clone().requires_grad_()
    with attack_mode(calls):
        assert "Lean" in calls(x).grad_fn.name()
        monkeypatch.undo()
        assert "Lean" not in calls(x).grad_fn.name()
