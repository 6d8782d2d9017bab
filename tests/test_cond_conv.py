"""ExpertCondConv2d is a convolution whose kernel is mixed for each image, whichever way it is computed."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import ExpertCondConv2d, ExpertResNet18, attack_mode
from moe_kernels.nn import cond_conv
from moe_kernels.testing.networks import randomize_statistics

OFFSETS = torch.tensor([0, 3, 3, 5], dtype=torch.int32)


@pytest.fixture(params=[0, 2**31], ids=["mixed_first", "mixed_last"], autouse=True)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cond_conv, "MIX_FIRST", request.param)
    monkeypatch.setattr(cond_conv, "FEW", 0)


def made(*sizes: Any, **options: Any) -> ExpertCondConv2d:
    """A layer with a router as training would leave it, at random."""
    layer = ExpertCondConv2d(*sizes, **options)
    nn.init.normal_(layer.router.weight)
    return layer


def plain(layer: ExpertCondConv2d, x: Tensor) -> Tensor:
    """The layer's results by one plain convolution for each image."""
    results = []
    for e, (first, last) in enumerate(itertools.pairwise(OFFSETS.tolist())):
        means = x[first:last].mean((2, 3))
        if not layer.training:
            mean, var = layer.norm.running_mean[e], layer.norm.running_var[e]
            means = (means - mean) / (var + layer.norm.eps).sqrt()
        elif len(means):
            means = F.batch_norm(means, None, None, training=True, eps=layer.norm.eps)
        mix = F.linear(means, layer.router.weight[e], layer.router.bias[e]).sigmoid()  # type: ignore[index]
        for image, factors in zip(x[first:last], mix, strict=True):
            kernel = torch.einsum("k,kocij->ocij", factors, layer.weight[e])
            results.append(F.conv2d(image[None], kernel, None, layer.stride, layer.padding))
    return torch.cat(results)


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return y, *torch.autograd.grad((y * weights).sum(), inputs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, (2, 1)])
def test_equals_a_plain_convolution_for_each_image(
    stride: int | tuple[int, int], layout: torch.memory_format, training: bool
) -> None:
    layer = made(3, 4, 5, 6, (3, 5), stride, (1, 2), dtype=torch.float64).train(training)
    nn.init.uniform_(layer.norm.running_mean, -0.2, 0.2)
    nn.init.uniform_(layer.norm.running_var, 0.5, 1.5)
    x = torch.randn(5, 5, 9, 7, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    inputs = (x, *layer.parameters())
    torch.testing.assert_close(gradients(layer(x, OFFSETS), *inputs), gradients(plain(layer, x), *inputs))


def test_winograd_in_fp32() -> None:
    layer, x = made(3, 4, 16, 32, 3, 1, 1), torch.randn(5, 16, 16, 16, requires_grad=True)
    expected = gradients(plain(layer.double(), x.double()), *layer.parameters())
    result = gradients(layer.float()(x, OFFSETS), *layer.parameters())
    torch.testing.assert_close(result, tuple(t.float() for t in expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_images(rows: int) -> None:
    layer, x = made(2, 3, 4, 5, 3, padding=1).eval(), torch.randn(rows, 4, 6, 6, requires_grad=True)
    y = layer(x, torch.tensor([0, rows, rows], dtype=torch.int32))
    y.sum().backward()
    assert y.shape == (rows, 5, 6, 6)
    assert layer.weight.grad is not None and (layer.weight.grad != 0).flatten(1).any(1).tolist() == [rows > 0, False]


def test_one_kernel_is_a_convolution_times_a_coefficient() -> None:
    layer, x = made(3, 1, 4, 5, 3).eval(), torch.randn(5, 4, 6, 6)
    torch.testing.assert_close(layer(x, OFFSETS), plain(layer, x))


@pytest.mark.parametrize("recompute", ["none", "activations", "all"])
def test_a_network_of_them(recompute: str) -> None:
    """Recomputing changes nothing, and each expert is the network of its own weights."""
    torch.manual_seed(0)
    grouped = ExpertResNet18(3, 7, 2, 4, dtype=torch.float64, num_kernels=2, recompute=recompute)
    assert [m.weight.shape[1] for m in grouped.modules() if isinstance(m, ExpertCondConv2d)] == 16 * [2]
    for layer in (m for m in grouped.modules() if isinstance(m, ExpertCondConv2d)):
        nn.init.normal_(layer.router.weight)
    x = torch.randn(5, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    inputs = [x, *grouped.parameters()]
    found = torch.autograd.grad(grouped(x, OFFSETS).square().sum(), inputs, materialize_grads=True)
    totals = [torch.zeros_like(t) for t in inputs]
    for e, (first, last) in enumerate(itertools.pairwise(OFFSETS.tolist())):
        if first == last:
            continue
        single = ExpertResNet18(1, 7, 2, 4, dtype=torch.float64, num_kernels=2, recompute="none")
        single.load_state_dicts([{**grouped.state_dicts()[e]}])
        rows = x.detach()[first:last].requires_grad_()
        y = single(rows, torch.tensor([0, last - first], dtype=torch.int32))
        for total, grad, place in zip(
            totals,
            torch.autograd.grad(y.square().sum(), [rows, *single.parameters()]),
            [slice(first, last), *(slice(e, e + 1) for _ in single.parameters())],
            strict=True,
        ):
            total[place] += grad
    torch.testing.assert_close(found, tuple(totals))


def test_attack_mode_keeps_the_gradient() -> None:
    net = randomize_statistics(ExpertResNet18(1, 7, 3, 16, num_kernels=3)).eval().requires_grad_(False)
    for layer in (m for m in net.modules() if isinstance(m, ExpertCondConv2d)):
        nn.init.normal_(layer.router.weight)
    offsets = torch.tensor([0, 4], dtype=torch.int32)

    def gradient(run: Callable[[Tensor], Tensor]) -> Tensor:
        x = torch.linspace(0, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32).requires_grad_()
        return torch.autograd.grad(run(x).square().sum(), x)[0]

    with attack_mode(net):
        attacked = gradient(lambda x: net(x, offsets))
    torch.testing.assert_close(attacked, gradient(lambda x: net(x, offsets)), rtol=1e-3, atol=1e-4)


def test_all_images_begin_with_one_kernel() -> None:
    layer, x = ExpertCondConv2d(3, 2, 4, 5, 3), torch.randn(5, 4, 6, 6)
    assert torch.equal(layer.coefficients(x, OFFSETS), torch.full((5, 2), 0.5))
    layer(x, OFFSETS).square().sum().backward()
    assert layer.router.weight.grad is not None and layer.router.weight.grad[2].any()


def test_the_coefficients_move_the_running_statistics_once() -> None:
    layer, x = made(3, 2, 4, 5, 3), torch.randn(5, 4, 6, 6, requires_grad=True)
    layer(x, OFFSETS).sum().backward()
    assert layer.norm.num_batches_tracked.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 2, 3, 4, 3), "num_experts must be an integer >= 1, got 0"),
        ((2, 0, 3, 4, 3), "num_kernels must be an integer >= 1, got 0"),
        ((2, 2, 0, 4, 3), "in_channels must be an integer >= 1, got 0"),
        ((2, 2, 3, 0, 3), "out_channels must be an integer >= 1, got 0"),
        ((2, 2, 3, 4, 0), "kernel_size must be one or two integers >= 1, got 0"),
        ((2, 2, 3, 4, 3, 0), "stride must be one or two integers >= 1, got 0"),
        ((2, 2, 3, 4, 3, 1, -1), "padding must be one or two integers >= 0, got -1"),
    ],
)
def test_sizes_that_it_refuses(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertCondConv2d(*sizes)


def test_compiled() -> None:
    """Inductor once gave wrong gradients of images from a concatenation of scaled copies."""
    layer, x = made(3, 2, 4, 5, 3, padding=1).eval(), torch.randn(5, 4, 4, 4, requires_grad=True)
    results = [gradients(run(x, OFFSETS), x) for run in (torch.compile(layer), layer)]
    torch.testing.assert_close(*results)


def test_what_is_saved_for_the_backward() -> None:
    """With recompute="activations", neither kernels for each image nor copies of the weights or of images."""
    net = ExpertResNet18(1, 7, 3, 16, num_kernels=3, recompute="activations")
    sizes: list[int] = []
    owned = {p.data_ptr() for p in net.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(0 if t.data_ptr() in owned else t.nbytes) or t, lambda t: t
    ):
        net(torch.randn(4, 3, 32, 32), torch.tensor([0, 4], dtype=torch.int32))
    assert max(sizes) <= 4 * 4 * 16 * 32 * 32


def test_input_that_it_refuses() -> None:
    layer = ExpertCondConv2d(3, 2, 4, 5, 3)
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\] with C = in_channels"):
        layer(torch.randn(5, 4, 6), OFFSETS)
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\] with C = in_channels"):
        layer(torch.randn(5, 3, 6, 6), OFFSETS)
    with pytest.raises(ValueError, match=r"offsets must be int32 of shape \[4\]"):
        layer(torch.randn(5, 4, 6, 6), OFFSETS[1:])
    with pytest.raises(ValueError, match=r"no larger than the padded image, here x \[5, 4, 2, 6\]"):
        layer(torch.randn(5, 4, 2, 6), OFFSETS)
    assert not layer.norm.num_batches_tracked.any() and "weight=[3, 2, 5, 4, 3, 3], stride=1" in repr(layer)
