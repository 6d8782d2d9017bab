"""Inside attack_mode an operation returns what torch's does, saves little, and refuses what torch refuses."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from attacked import input_gradient
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moe_kernels.attacks import attack_mode, rules
from moe_kernels.testing import Source
from moe_kernels.testing.saved import saved_bytes

S = Source(torch.float32)

pytestmark = pytest.mark.usefixtures("rules_for_few_elements")

IMAGE, CONV, TRANSPOSED = S.randn(2, 4, 9, 8), S.randn(6, 2, 3, 3), S.randn(4, 3, 3, 3)
PIXEL = CONV.flatten()[:24].view(6, 4, 1, 1)
OPERATIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "grouped conv": (lambda x: F.conv2d(x, CONV, S.randn(6), (2, 1), 1, groups=2), 0),
    "conv padded to the same": (lambda x: F.conv2d(x, CONV[:, :, :, :2], padding="same", dilation=2, groups=2), 0),
    "conv not padded": (lambda x: F.conv2d(x, CONV, padding="valid", groups=2), 0),
    "conv1d": (lambda x: torch.conv1d(x.flatten(2), CONV[:, :, 0], dilation=2, groups=2), 0),
    "conv3d": (lambda x: F.conv3d(x[:, None], CONV[:, :1, None]), 0),
    "conv of every other pixel": (lambda x: F.conv2d(x, PIXEL, None, (2, 3)), 0),
    "conv of every other pixel, padded": (lambda x: F.conv2d(x, PIXEL, None, 2, 1), 0),
    "transposed conv to every other pixel": (lambda x: F.conv_transpose2d(x, PIXEL[:4, :3], None, 2), 0),
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


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_of_an_expanded_image_and_batches_of_gradients(name: str, batched: bool) -> None:
    function, _ = OPERATIONS[name]

    def gradients(together: bool) -> Tensor:
        S.generator.manual_seed(3)
        x = IMAGE[:1].clone().requires_grad_()
        y = function(x if batched else x.expand(2, -1, -1, -1))
        grads = S.randn(3, *y.shape)
        if together:
            return torch.autograd.grad(y, x, grads, is_grads_batched=True)[0]
        return torch.stack([torch.autograd.grad(y, x, grad, retain_graph=True)[0] for grad in grads])

    expected = gradients(together=False)
    with attack_mode(nn.Identity()):
        torch.testing.assert_close(gradients(together=batched), expected)


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


@pytest.mark.parametrize("calls", [F.relu, lambda x: F.conv2d(x, CONV, groups=2)])
def test_few_elements_are_left_to_torch(calls: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    x = IMAGE.clone().requires_grad_()
    with attack_mode(calls):
        assert "Lean" in calls(x).grad_fn.name()
        monkeypatch.undo()
        assert "Lean" not in calls(x).grad_fn.name()
