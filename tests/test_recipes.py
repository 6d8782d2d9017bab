"""What attack_mode recomputes is bitwise the same, up to second derivatives, or an error is raised."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moe_kernels.attacks import attack_mode
from moe_kernels.testing import Source
from moe_kernels.testing.saved import saved_bytes

TOKENS, D = 6, 16
X_BYTES = 4 * 2 * TOKENS * D
MEANS_BYTES = 2 * 4 * 2 * TOKENS  # mean and deviation of each token


class Net(nn.Module):
    """A norm and a linear map, which a function uses."""

    def __init__(self, function: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(D), nn.Linear(D, 3 * D)
        self.head_norm = nn.LayerNorm(8)
        self.function = function
        s = Source(torch.float32)
        for p in self.parameters():
            p.data = s.randn(*p.shape)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, 2 * x)

    def map(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


def attention(net: Net, x: Tensor) -> Tensor:
    """As timm writes it."""
    q, k, v = net.map(x).reshape(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


def block(net: Net, x: Tensor) -> Tensor:
    """A transformer block with a scale after its attention."""
    x = x + net.linear(attention(net, x))[..., :D] * net.head_norm.weight.repeat(2)
    return x + F.gelu(net.map(x)).unflatten(2, (3, D)).sum(2)


def attention_by_hand(net: Net, x: Tensor) -> Tensor:
    q, k, v = (h.unflatten(2, (2, 8)).transpose(1, 2) for h in net.map(x).chunk(3, 2))
    return (q * 8**-0.5 @ k.mT).softmax(-1) @ v


def shifted_windows(net: Net, x: Tensor) -> Tensor:
    """Attention within windows of 4 of 8 tokens, as a Swin transformer shifts and pads them."""
    h = F.pad(torch.roll(net.norm(x), 1, 1), (0, 0, 0, 8 - TOKENS)).unflatten(1, (2, 4)).flatten(0, 1)
    q, k, v = net.linear(h).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    h = ((q * 8**-0.5) @ k.mT).softmax(-1) @ v
    return F.layer_norm(x, [D]) + h.transpose(1, 2).reshape(len(x), 8, D)[:, :TOKENS].roll(-1, 1)


def products_of_all_kinds(net: Net, x: Tensor) -> Tensor:
    """Products of matrices, of a batch with one matrix, and of batches of different shapes; torch refuses out=."""
    h = net.norm(x)
    heads = h.unflatten(2, (2, 8)).transpose(1, 2)
    with pytest.raises(RuntimeError, match="out="):
        torch.matmul(heads, heads.mT, out=torch.empty(0))
    y = (h[0] @ h[1].mT) @ h + torch.matmul(heads, heads[:, :1].mT).sum(1) @ h
    return F.gelu(y @ torch.ones(D, D) + torch.matmul(input=heads, other=heads.mT).sum((1, 3))[..., None])


def attention_with_norms(net: Net, x: Tensor) -> Tensor:
    q, k, v = (h.unflatten(2, (2, 8)).transpose(1, 2) for h in net.map(x).chunk(3, 2))
    return F.scaled_dot_product_attention(net.head_norm(q), net.head_norm(k), v)


def noise_written_anew(net: Net, x: Tensor) -> Tensor:
    """Noise is written anew between two uses, as in randomised smoothing."""
    noise, y = torch.ones(D), x
    for value in (0.5, -0.5):
        y = y + F.gelu(net.norm(x) + noise.fill_(value))
    return y


def written_to(net: Net, x: Tensor) -> Tensor:
    z = net.map(x)
    return F.gelu(z.mul_(0.5)) + F.silu(z)


def written_to_through_data(net: Net, x: Tensor) -> Tensor:
    z = net.map(x)
    z.data.clamp_(-0.5, 0.5)
    return F.gelu(z)


def a_view_written_to(net: Net, x: Tensor) -> Tensor:
    h = net.norm(x)
    h[:, :2] = 1
    return F.gelu(net.linear(h))


def a_bias_written_to(net: Net, x: Tensor) -> Tensor:
    z = net.map(x)
    net.linear.bias.mul_(2)
    y = F.gelu(z)
    net.linear.bias.mul_(0.5)
    return y


def complex_numbers(net: Net, x: Tensor) -> Tensor:
    return torch.view_as_complex(net.map(x).float().unflatten(-1, (-1, 2))).abs()


def mixed_precision(net: Net, x: Tensor) -> Tensor:
    h = net.norm(x)
    with torch.autocast("cpu", torch.bfloat16):
        z = net.linear(h)
    return F.gelu(z.float()) + F.gelu(z)


def in_checkpoint(net: Net, x: Tensor) -> Tensor:
    return F.gelu(net.map(x)) + checkpoint(lambda x: F.silu(net.map(x)), x, use_reentrant=False)


def without_nonlinearity(net: Net, x: Tensor) -> Tensor:
    for _ in range(5):
        x = net.map(x)[..., :D] + 1
    return F.gelu(x)


# {name: (function, bytes saved besides the norm's input and statistics, or None if they do not matter)}
FUNCTIONS: dict[str, tuple[Callable[[Net, Tensor], Tensor], int | None]] = {
    "gelu": (lambda net, x: F.gelu(net.map(x)), 0),
    "silu and tanh-gelu": (lambda net, x: F.silu(net.map(x)) * 2 + F.gelu(net.map(x), approximate="tanh"), None),
    "gated": (lambda net, x: torch.mul(*net.map(x)[..., : 2 * D].chunk(2, -1)), 0),
    "group norm": (lambda net, x: F.silu(F.group_norm(x, 2)), -MEANS_BYTES + 2 * 4 * 2 * 2),
    "rms norm": (lambda net, x: F.silu(F.rms_norm(x, [D], net.norm.weight)), -MEANS_BYTES // 2),
    "attention": (attention, X_BYTES + 4 * 2 * 2 * TOKENS),  # its result and a normaliser for each head
    "block": (block, X_BYTES + 4 * 2 * 2 * TOKENS + MEANS_BYTES + 4 * D),  # the same, the second norm's, and the scale
    "product of two": (lambda net, x: F.silu(net.norm(x) * (net.norm(x) + 1)), MEANS_BYTES),
    "attention by hand": (attention_by_hand, 4 * 2 * 2 * TOKENS * TOKENS),  # the softmax
    "products of all kinds": (products_of_all_kinds, None),
    "shifted windows": (shifted_windows, 4 * 2 * 2 * 2 * 4 * 4 + MEANS_BYTES),
    "attention with norms": (attention_with_norms, None),
    "written to": (written_to, None),
    "written to through data": (written_to_through_data, None),
    "a view written to": (a_view_written_to, None),
    "noise written anew": (noise_written_anew, None),
    "a temporary bias": (
        lambda net, x: F.gelu(F.linear(net.norm(x), net.linear.weight, net.linear.bias + 1)),
        4 * 3 * D,
    ),
    "a bias written to": (a_bias_written_to, 3 * X_BYTES),
    "complex numbers": (complex_numbers, None),
    "mixed precision": (mixed_precision, None),
    "in checkpoint": (in_checkpoint, None),
    "eight steps": (lambda net, x: F.gelu(sum(range(7), net.norm(x))), 0),
    "nine steps": (lambda net, x: F.gelu(sum(range(8), net.norm(x))), X_BYTES),
    "four steps to a norm": (lambda net, x: F.gelu(net.map(sum(range(3), net.norm(x)))), MEANS_BYTES),
    "five steps to a norm": (lambda net, x: F.gelu(net.map(sum(range(4), net.norm(x)))), MEANS_BYTES + X_BYTES),
    "without nonlinearity": (without_nonlinearity, None),
}


def derivatives(net: Net, x: Tensor) -> list[Tensor]:
    """The gradient and, where torch supports it, the gradient of a function of the gradient."""
    x = x.clone().requires_grad_()
    y = net(x)
    gradient = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    once = net.function in (attention, attention_with_norms, block)
    return [*gradient, *([] if once else torch.autograd.grad(gradient[0].square().sum(), x))]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_first_and_second_derivatives_are_bitwise_those_of_eager(name: str, autocast: bool) -> None:
    function, kept = FUNCTIONS[name]
    net, x = Net(function), Source(torch.float32).randn(2, TOKENS, D)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = derivatives(net, x)
        with attack_mode(net, "activations"):
            got = derivatives(net, x)
            leaf = x.clone().requires_grad_()
            saved = saved_bytes(lambda: net(leaf), apart_from=net)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert autocast or kept is None or saved == X_BYTES + MEANS_BYTES + kept


@pytest.mark.parametrize("changed", ["the norm's input", "a weight"])
def test_a_changed_source_is_an_error(changed: str) -> None:
    net, x = Net(lambda net, x: F.gelu(net.map(x))), torch.randn(2, TOKENS, D, requires_grad=True)
    with attack_mode(net, "activations"):
        h = 2 * x
        y = net.function(net, h)
        with torch.no_grad():
            (h if changed == "the norm's input" else net.linear.weight).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("function, maps", [(attention, 1), (attention_by_hand, 1), (block, 3)])
def test_what_several_operations_need_is_computed_once(function: Callable[[Net, Tensor], Tensor], maps: int) -> None:
    """One linear map gives queries, keys and values; the sum after the attention goes to a norm and to a later sum."""
    net, x = Net(function), torch.randn(2, TOKENS, D, requires_grad=True)
    with attack_mode(net, "activations"):
        y = net(x).sum()
        with torch.profiler.profile() as profile:
            torch.autograd.grad(y, x)
    assert [event.count for event in profile.key_averages() if event.key == "aten::linear"] == [maps]


def test_the_second_derivative_of_an_intermediate_result() -> None:
    net = Net(lambda net, x: net.map(x))

    def second(x: Tensor) -> Tensor:
        z = net(x)
        (first,) = torch.autograd.grad(F.gelu(z).sum(), z, create_graph=True)
        return torch.autograd.grad(first.sum(), z)[0]

    x = torch.randn(2, TOKENS, D, requires_grad=True)
    expected = second(x)
    with attack_mode(net, "activations"):
        assert torch.equal(second(x), expected)


def test_trainable_weights_inside_get_their_gradients() -> None:
    net, x = Net(lambda net, x: F.gelu(net.map(x))), torch.randn(2, TOKENS, D, requires_grad=True)
    net.requires_grad_(True)
    expected = torch.autograd.grad(net(x).sum(), [x, *net.norm.parameters(), *net.linear.parameters()])
    with attack_mode(nn.Identity(), "activations"):
        got = torch.autograd.grad(net(x).sum(), [x, *net.norm.parameters(), *net.linear.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_nothing_that_the_forward_frees_is_kept() -> None:
    net, x = Net(lambda net, x: net.map(x)), torch.randn(2, TOKENS, D, requires_grad=True)
    with attack_mode(net, "activations"), torch.autograd.graph.save_on_cpu():
        ys = [F.gelu(net(x)) for _ in range(3)]
        ys[1] = ys[0]
        first, second = (torch.autograd.grad(ys[0].sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
