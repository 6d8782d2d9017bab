"""The README's Python code runs as it is printed there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_kernels import RobustMoE
from moe_kernels.testing import Source

README = Path(__file__).parent.parent / "README.md"
LAYER, ATTACK, ROUTE = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
S = Source(torch.float32)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Makes the tests independent of conftest.py, without which the wheel's test runs them, and of each other."""
    torch.manual_seed(0)
    S.generator.manual_seed(0)


def test_the_layer() -> None:
    names: dict[str, Any] = {}
    exec(LAYER, names)
    block, x = names["Block"](8).eval(), S.randn(2, 5, 8)
    y, balance = block(x)
    assert torch.autograd.grad(balance, block.moe.router.weight)[0].abs().max() > 0
    with torch.no_grad():
        torch.testing.assert_close(block(x)[0], y)
        for p in block.moe.experts.parameters():
            p.zero_()
        assert not torch.allclose(block(x)[0], y)
    block.train().moe.keep_routing = True
    assert torch.equal(block(x)[1], block.moe.last_routing.balance_loss())


def test_the_attacks() -> None:
    experts = [nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(4)]
    model = RobustMoE.from_experts(experts, nn.Sequential(nn.Flatten(), nn.Linear(12, 4)))
    names = {"model": model, "x": (x := S.rand(5, 3, 2, 2)), "y": model(x).argmax(1)}  # all of which withstand at first
    exec(ATTACK, names)
    assert 0 < (names["x_adv"] - names["x"]).abs().max() <= 8 / 255
    exec(ROUTE, names)
    assert names["x_route"].shape[0] == names["standing"].sum() and names["broken"] <= names["standing"].sum()
