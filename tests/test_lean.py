"""Inside attack_mode a forward of a network saves little, and the input gradient equals torch's to the bit, apart from
large convolutions."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from attacked import input_gradient
from torch import Tensor, nn

from moe_kernels import ExpertResNet18, ExpertViT
from moe_kernels.attacks import attack_mode
from moe_kernels.testing import Source
from moe_kernels.testing.networks import PreActResNet, ResNet18, ViT, randomize_statistics
from moe_kernels.testing.saved import saved_bytes

S = Source(torch.float32)

pytestmark = pytest.mark.usefixtures("rules_for_few_elements")
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


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet18(width=8),
    "preact": lambda: PreActResNet(((8, 2), (16, 2)), 8),
    "vit": lambda: ViT(32, 8, 32, 2, 2),
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10)),
    "decoder": DecoderNet,
    "experts": lambda: Alone(ExpertResNet18(1, width=4)),
    "expert vit": lambda: Alone(ExpertViT(1, image_size=32, patch=8, width=32, depth=2, heads=2)),
}


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
