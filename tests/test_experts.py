"""ExpertLinear and ExpertMLP equal a loop over plain modules."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels.nn import ExpertLinear, ExpertMLP
from moe_kernels.ops.expert_mlp import ACTIVATIONS
from moe_kernels.testing import Source

COUNTS = (4, 0, 3)
OFFSETS = Source(torch.float32).offsets(COUNTS)


def plain_activation(name: str, h: Tensor) -> Tensor:
    if name in ("swiglu", "geglu"):
        gate, value = h.chunk(2, -1)
        return (F.silu(gate) if name == "swiglu" else F.gelu(gate)) * value
    return {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "relu2": lambda t: F.relu(t) ** 2}[name](h)


def loop(mlp: ExpertMLP, x: Tensor) -> Tensor:
    parts = []
    for e, rows in enumerate(x.split(COUNTS)):
        up, down = (nn.utils.skip_init(nn.Linear, *layer.weight[e].T.shape) for layer in (mlp.up, mlp.down))
        hidden = torch.func.functional_call(up, {"weight": mlp.up.weight[e], "bias": mlp.up.bias[e]}, rows)
        hidden = plain_activation(mlp.activation, hidden)
        parts.append(torch.func.functional_call(down, {"weight": mlp.down.weight[e], "bias": mlp.down.bias[e]}, hidden))
    return torch.cat(parts)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_equals_a_loop_over_experts(activation: str) -> None:
    mlp, x = ExpertMLP(3, 5, 6, activation), torch.randn(7, 5, requires_grad=True)
    y, expected = mlp(x, OFFSETS), loop(mlp, x)
    torch.testing.assert_close(y, expected)
    leaves = [x, *mlp.parameters()]
    out, ref = (torch.autograd.grad(t.pow(3).sum(), leaves) for t in (y, expected))
    torch.testing.assert_close(out, ref)


def test_mlp_gathers_rows() -> None:
    mlp, tokens = ExpertMLP(3, 5, 6), torch.randn(4, 5)
    rows = torch.tensor([3, 0, 0, 1, 2, 2, 3], dtype=torch.int32)
    torch.testing.assert_close(mlp(tokens, OFFSETS, rows), mlp(tokens[rows], OFFSETS))


def test_mlp_names_its_activations() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of relu, gelu, .*, got 'tanh'"):
        ExpertMLP(2, 3, 4, "tanh")


def test_initial_values_are_those_of_linear() -> None:
    layer = ExpertLinear(4, 100, 500)
    assert layer.weight.abs().max() <= 0.1 and layer.bias is not None and layer.bias.abs().max() <= 0.1
    plain = nn.Linear(100, 500)
    for e in range(4):
        torch.testing.assert_close(layer.weight[e].std(), plain.weight.std(), rtol=0.02, atol=0)


def test_state_and_copies() -> None:
    mlp, x = ExpertMLP(3, 5, 6, "geglu"), torch.randn(7, 5)
    assert {k: list(v.shape) for k, v in mlp.state_dict().items()} == {
        "up.weight": [3, 12, 5],
        "up.bias": [3, 12],
        "down.weight": [3, 5, 6],
        "down.bias": [3, 5],
    }
    file = io.BytesIO()
    torch.save(mlp, file)
    file.seek(0)
    for other in (copy.deepcopy(mlp), torch.load(file, weights_only=False)):
        assert torch.equal(other(x, OFFSETS), mlp(x, OFFSETS))


def test_mlp_double_backward() -> None:
    mlp, x = ExpertMLP(3, 2, 3, "relu2", dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda t: mlp(t, OFFSETS), x.requires_grad_())


def test_mlp_under_autocast() -> None:
    mlp, x = ExpertMLP(3, 5, 6, "swiglu"), torch.randn(7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(x, OFFSETS)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), mlp(x, OFFSETS), rtol=0.05, atol=0.05)


def test_mlp_compiles_without_a_graph_break() -> None:
    mlp, x = ExpertMLP(3, 5, 6, "relu"), torch.randn(7, 5)
    torch.testing.assert_close(torch.compile(mlp, fullgraph=True)(x, OFFSETS), mlp(x, OFFSETS))
