"""ExpertResNet18 and its layers equal a loop over plain ResNet-18s."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moe_kernels.nn import ExpertBatchNorm2d, ExpertConv2d, ExpertResNet18, ResNet18Trunk
from moe_kernels.testing import Source
from moe_kernels.testing.networks import ResNet18, randomize_statistics
from moe_kernels.testing.saved import saved_bytes

COUNTS = (3, 0, 2)
OFFSETS = Source(torch.float32).offsets(COUNTS)


def pair(width: int = 4, **kinds: torch.dtype) -> tuple[ExpertResNet18, nn.ModuleList]:
    """Three plain networks with different statistics, and the grouped network of their state dicts."""
    plain = nn.ModuleList(ResNet18(7, 2, width) for _ in COUNTS).to(**kinds)
    randomize_statistics(plain)
    return ExpertResNet18.from_state_dicts([net.state_dict() for net in plain]), plain


def loop(plain: nn.ModuleList, x: Tensor) -> Tensor:
    return torch.cat([net(rows) for net, rows in zip(plain, x.split(COUNTS), strict=True) if len(rows)])


def by_expert(plain: nn.ModuleList, name: str) -> Tensor:
    values = [net.get_parameter(name) for net in plain]
    return torch.stack([torch.zeros_like(v) if v.grad is None else v.grad for v in values])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_a_loop_over_plain_networks(training: bool, layout: torch.memory_format) -> None:
    grouped, plain = pair(dtype=torch.float64)
    grouped.train(training), plain.train(training)
    x = torch.randn(5, 2, 16, 16, dtype=torch.float64).contiguous(memory_format=layout)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    y, expected = grouped(inputs[0], OFFSETS), loop(plain, inputs[1])
    torch.testing.assert_close(y, expected)
    for out in (y, expected):
        out.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for name, parameter in grouped.named_parameters():
        torch.testing.assert_close(parameter.grad, by_expert(plain, name), msg=lambda m, name=name: f"{name}: {m}")
    for ours, theirs in zip(grouped.state_dicts(), plain, strict=True):
        torch.testing.assert_close(ours, dict(theirs.state_dict()))


def test_state_dicts_go_both_ways() -> None:
    grouped, plain = pair()
    for ours, net in zip(grouped.state_dicts(), plain, strict=True):
        assert ours.keys() == net.state_dict().keys()
        assert all(torch.equal(ours[key], value) for key, value in net.state_dict().items())
    net = ResNet18(7, 2, 4)
    net.load_state_dict(grouped.state_dicts()[1])


def test_loads_torchvision_names() -> None:
    grouped, plain = pair()
    renamed = [
        {k.replace("shortcut", "downsample").replace("linear", "fc"): v for k, v in net.state_dict().items()}
        for net in plain
    ]
    for key, value in ExpertResNet18.from_state_dicts(renamed).state_dict().items():
        assert torch.equal(value, grouped.state_dict()[key])
    trunk = ResNet18Trunk(2, 2, 4)
    trunk.load_state_dicts([{key: renamed[0][key.replace("shortcut", "downsample")] for key in trunk.state_dict()}])


def test_bad_state_dicts_name_the_keys() -> None:
    state = ResNet18(7, 2, 4).state_dict()
    less = {k: v for k, v in state.items() if k != "bn1.bias"} | {"extra": torch.zeros(1)}
    other = state | {"layer1.0.conv1.weight": torch.zeros(4, 4, 1, 1)}
    for match, states in {
        r"experts must be a list of at least one state dict, got none": [],
        r"experts\[0\] must be a ResNet-18 state dict, missing conv1.weight": [{}],
        r"experts\[1\] .*; missing: bn1.bias; unexpected: extra$": [state, less],
        r"experts\[1\] .*; shapes: layer1.0.conv1.weight \[4, 4, 1, 1\] instead of \[4, 4, 3, 3\]": [state, other],
    }.items():
        with pytest.raises(ValueError, match=match):
            ExpertResNet18.from_state_dicts(states)


def test_copies_and_files() -> None:
    grouped, x = pair()[0].eval(), torch.randn(5, 2, 8, 8)
    file = io.BytesIO()
    torch.save(grouped, file)
    file.seek(0)
    for other in (copy.deepcopy(grouped), torch.load(file, weights_only=False)):
        assert torch.equal(other(x, OFFSETS), grouped(x, OFFSETS))


def test_initial_values_are_those_of_the_plain_layers() -> None:
    conv, plain = ExpertConv2d(3, 20, 30, (3, 5)), nn.Conv2d(20, 30, (3, 5))
    assert conv.bias is not None and plain.bias is not None
    bound = (20 * 15) ** -0.5
    for ours, theirs in ((conv.weight, plain.weight), (conv.bias, plain.bias)):
        assert 0.9 * bound < ours.abs().max() <= bound and theirs.abs().max() <= bound
    norm = ExpertBatchNorm2d(3, 4)
    for name, value in nn.BatchNorm2d(4).state_dict().items():
        assert torch.equal(norm.state_dict()[name], value.expand(3, *value.shape)), name


def test_layers_without_parameters() -> None:
    x = torch.randn(5, 4, 3, 3)
    assert ExpertConv2d(3, 4, 2, 1, bias=False).bias is None
    norm = ExpertBatchNorm2d(3, 4, affine=False)
    expected = torch.cat(
        [F.batch_norm(x[:3], None, None, training=True), F.batch_norm(x[3:], None, None, training=True)]
    )
    torch.testing.assert_close(norm(x, OFFSETS), expected)
    assert norm.num_batches_tracked.tolist() == [1, 0, 1]


def test_batch_norm_has_no_cumulative_average() -> None:
    with pytest.raises(ValueError, match="momentum must be a number, got None"):
        ExpertBatchNorm2d(3, 4, momentum=None)


def test_autocast() -> None:
    grouped, x = pair()[0].eval(), torch.randn(5, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped(x, OFFSETS)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), grouped(x, OFFSETS), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("training", [True, False])
def test_double_backward(training: bool) -> None:
    grouped, plain = pair(2, dtype=torch.float64)
    grouped.train(training), plain.train(training)
    x = torch.randn(5, 2, 16, 16, dtype=torch.float64, requires_grad=True)
    second = []
    for y in (grouped(x, OFFSETS), loop(plain, x)):
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(*second)


def test_compiles_without_a_graph_break() -> None:
    grouped, _ = pair(2)
    grouped.eval()
    x = torch.randn(5, 2, 8, 8, requires_grad=True)
    compiled, eager = torch.compile(grouped, fullgraph=True)(x, OFFSETS), grouped(x, OFFSETS)
    torch.testing.assert_close(compiled, eager)
    out, expected = (torch.autograd.grad(y.square().sum(), x) for y in (compiled, eager))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    "recompute, in_fp32, in_bf16",
    [("none", 4_737_024, 2_403_328), ("activations", 2_279_424, 1_186_816), ("all", 12_288, 12_288)],
)
def test_training_keeps_bytes_per_image(recompute: str, in_fp32: int, in_bf16: int) -> None:
    net = ExpertResNet18(1, recompute=recompute)
    for expected, autocast in ((in_fp32, False), (in_bf16, True)):
        kept = []
        for images in (1, 2):
            x, offsets = torch.rand(images, 3, 32, 32), torch.tensor([0, images], dtype=torch.int32)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                kept.append(saved_bytes(lambda x=x, offsets=offsets: net(x, offsets), apart_from=net))
        assert kept[1] - kept[0] == expected


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("recompute", ["activations", "all"])
def test_recompute_is_bitwise_the_same(recompute: str, autocast: bool) -> None:
    plain = ExpertResNet18(3, 4, 2, 4, recompute="none")
    net = ExpertResNet18(3, 4, 2, 4, recompute=recompute)
    net.load_state_dict(plain.state_dict())
    inputs = [Source(torch.float32).randn(5, 2, 8, 8).requires_grad_() for _ in range(2)]
    for model, x in zip((plain, net), inputs, strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x, OFFSETS)
        y.float().square().sum().backward(retain_graph=True)
        y.float().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for name, value in plain.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


@pytest.mark.parametrize("recompute", ["activations", "all"])
def test_recompute_has_the_mode_and_weights_of_the_forward(recompute: str) -> None:
    found = []
    for kind in ("none", recompute):
        torch.manual_seed(0)
        net, x = ExpertResNet18(3, 4, 2, 4, recompute=kind), torch.randn(5, 2, 8, 8)
        weights = {name: torch.randn_like(p).requires_grad_() for name, p in net.named_parameters()}
        loss = functional_call(net, weights, (x, OFFSETS)).square().sum()
        net.eval()
        found.append(torch.autograd.grad(loss, list(weights.values())))
        assert not net.training and net.bn1.updates and net.conv1.weight.is_leaf
    assert all(map(torch.equal, *found))


def test_recompute_has_second_derivatives() -> None:
    results = []
    for recompute in ("none", "activations", "all"):
        torch.manual_seed(0)
        net = ExpertResNet18(3, 4, 2, 2, dtype=torch.float64, recompute=recompute)
        x = torch.randn(5, 2, 8, 8, dtype=torch.float64, requires_grad=True)
        (dx,) = torch.autograd.grad(net(x, OFFSETS).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), [x, net.conv1.weight, net.layer2[0].conv2.weight]))
    torch.testing.assert_close(results[1:], [results[0]] * 2)


@pytest.mark.parametrize("recompute", ["activations", "all"])
def test_recompute_leaves_other_hooks_and_checkpoints_in_place(recompute: str) -> None:
    net, x = ExpertResNet18(3, 4, 2, 2, recompute=recompute), torch.randn(5, 2, 8, 8, requires_grad=True)
    expected = torch.autograd.grad(net(x, OFFSETS).sum(), [x, *net.parameters()])
    with torch.autograd.graph.save_on_cpu():
        y = net(x, OFFSETS).sum()
    for out in (y, checkpoint(net, x, OFFSETS, use_reentrant=False).sum()):
        assert all(map(torch.equal, torch.autograd.grad(out, [x, *net.parameters()]), expected))
