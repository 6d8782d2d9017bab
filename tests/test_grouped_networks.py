"""PreAct ResNet-18, wide ResNets and vision transformers of experts equal a loop over plain networks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moe_kernels import ExpertLayerNorm, ExpertPreActResNet, ExpertViT, attack_mode
from moe_kernels.nn.grouped import GroupedNetwork
from moe_kernels.nn.layers import parameter_of_each_row
from moe_kernels.testing import Source
from moe_kernels.testing.networks import PreActResNet, ViT, randomize_statistics

COUNTS = (3, 0, 2)
OFFSETS = Source(torch.float32).offsets(COUNTS)


def timm_state(net: ViT) -> dict[str, Tensor]:
    """The plain transformer's state in timm's names."""
    names = {
        "patches": "patch_embed.proj", "class_token": "cls_token", "position": "pos_embed", "encoder.layers": "blocks",
        "self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj": "attn.proj", "linear1": "mlp.fc1",
        "linear2": "mlp.fc2", "encoder.norm": "norm",
    }  # fmt: skip
    state = {}
    for key, value in net.state_dict().items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        state[key] = value
    return state


def vit() -> ViT:
    net = ViT(size=8, patch=4, width=12, depth=2, heads=3, classes=7).eval()  # without its dropout
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    nn.init.normal_(net.class_token)
    return net


def preact() -> PreActResNet:
    return PreActResNet(((4, 2), (8, 2), (16, 2), (32, 2)), 4, 7)


def wide() -> PreActResNet:
    return PreActResNet(((6, 2), (12, 2), (24, 2)), 16, 7)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], GroupedNetwork]]] = {
    "preact": (preact, lambda: ExpertPreActResNet.resnet18(3, 7, 3, 4)),
    "wide": (wide, lambda: ExpertPreActResNet.wide(3, 7, 3, 16, 6)),
    "vit": (vit, lambda: ExpertViT(3, 7, 3, 8, 4, 12, 2, 3)),
}


@pytest.fixture(params=NETWORKS)
def pair(request: pytest.FixtureRequest) -> tuple[GroupedNetwork, nn.ModuleList]:
    make_plain, make_grouped = NETWORKS[request.param]
    plain = nn.ModuleList(randomize_statistics(make_plain()) for _ in COUNTS).double()
    grouped = make_grouped().double()
    grouped.load_state_dicts([timm_state(net) if isinstance(net, ViT) else net.state_dict() for net in plain])
    return grouped, plain


def loop(plain: nn.ModuleList, x: Tensor) -> Tensor:
    return torch.cat([net(rows) for net, rows in zip(plain, x.split(COUNTS), strict=True) if len(rows)])


def test_equals_a_loop_over_plain_networks(pair: tuple[GroupedNetwork, nn.ModuleList]) -> None:
    grouped, plain = pair
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [grouped(inputs[0], OFFSETS), loop(plain, inputs[1])]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    squares = [sum(p.grad.square().sum() for p in net.parameters() if p.grad is not None) for net in (grouped, plain)]
    torch.testing.assert_close(*squares)
    for ours, net in zip(grouped.state_dicts(), plain, strict=True):
        torch.testing.assert_close(ours, timm_state(net) if isinstance(net, ViT) else dict(net.state_dict()))


def test_input_gradient_in_attack_mode(pair: tuple[GroupedNetwork, nn.ModuleList]) -> None:
    grouped, _ = pair
    grouped.eval()
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(grouped(x, OFFSETS).square().sum(), x)
    with attack_mode(grouped):
        (gradient,) = torch.autograd.grad(grouped(x, OFFSETS).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_a_transformer_compiles_without_a_graph_break() -> None:
    grouped, x = NETWORKS["vit"][1]().eval(), torch.rand(5, 3, 8, 8)
    compiled = torch.compile(grouped, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, OFFSETS), grouped(x, OFFSETS))


def test_a_nan_stays_with_its_expert(pair: tuple[GroupedNetwork, nn.ModuleList]) -> None:
    grouped, _ = pair
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    x[3:] = torch.nan
    y = grouped(x, OFFSETS)
    y.square().sum().backward()
    assert y[:3].isfinite().all()
    with torch.no_grad():
        for p in grouped.parameters():
            assert p.grad is not None and p.grad[0].isfinite().all()
            p[2] = torch.nan
    assert torch.equal(grouped(x, OFFSETS)[:3], y[:3])


def test_parameter_of_each_row_is_twice_differentiable() -> None:
    parameter = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(parameter_of_each_row(parameter, OFFSETS, 5), parameter[[0, 0, 0, 2, 2]])
    assert torch.autograd.gradgradcheck(lambda p: parameter_of_each_row(p, OFFSETS, 5).pow(3), parameter)


def test_layer_norm_starts_as_torchs() -> None:
    x = torch.randn(5, 4, 6)
    torch.testing.assert_close(ExpertLayerNorm(3, 6)(x, OFFSETS), nn.LayerNorm(6)(x))


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(ValueError, match="depth must be 10, 16, 22, 28 or another 6 n \\+ 4, got 27"):
        ExpertPreActResNet.wide(2, depth=27)
    with pytest.raises(ValueError, match="image_size must be a multiple of patch, and width of heads, got 30 by 4"):
        ExpertViT(2, image_size=30, patch=4)
    with pytest.raises(ValueError, match=r"x must be \[N, C, 8, 8\], got \[5, 3, 9, 8\]"):
        NETWORKS["vit"][1]()(torch.rand(5, 3, 9, 8), OFFSETS)
    with pytest.raises(ValueError, match=r"x must have 4 dimensions, got shape \[3, 8, 8\]"):
        NETWORKS["preact"][1]()(torch.rand(3, 8, 8), OFFSETS)
    for match, size, offsets in (
        (r"x must be \[N, T, C\], here \['\*', '\*', 6\], got shape \[5, 4, 1\]", 1, OFFSETS),
        (r"offsets must be int32 of shape \[4\]", 6, OFFSETS[:3]),
        (r"offsets must run from 0 to the number of rows 5 and not decrease, got \[0, 3, 2, 5\]", 6, [0, 3, 2, 5]),
    ):
        with pytest.raises(ValueError, match=match):
            ExpertLayerNorm(3, 6)(torch.randn(5, 4, size), torch.as_tensor(offsets, dtype=torch.int32))
    grouped = NETWORKS["vit"][1]()
    with pytest.raises(ValueError, match="experts must be 3 state dicts, got 2"):
        grouped.load_state_dicts([{}, {}])
    with pytest.raises(ValueError, match=r"experts\[0\] must be a state dict .* of ExpertViT; missing: .*head"):
        grouped.load_state_dicts([{}, {}, {}])
