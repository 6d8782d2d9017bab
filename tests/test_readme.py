"""The README's Python runs as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moe_kernels
from moe_kernels import RobustMoE
from moe_kernels.testing import Source

README = Path(__file__).parent.parent / "README.md"
LAYER, NETWORKS, ATTACK, ROUTE, EVALUATION, _, IDEA = re.findall(
    r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE
)
S = Source(torch.float32)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Also where the README is run without conftest.py, and whichever of these tests a process runs before."""
    torch.manual_seed(0)
    S.generator.manual_seed(0)


def test_the_layer() -> None:
    names: dict[str, Any] = {}
    exec(LAYER, names)
    block, x = names["Block"](8, 2).eval(), S.randn(2, 5, 8)
    y, balance = block(x)
    assert torch.autograd.grad(balance, block.moe.router.weight)[0].abs().max() > 0
    with torch.no_grad():
        torch.testing.assert_close(block(x)[0], y)
        for p in block.moe.experts.parameters():
            p.zero_()
        assert not torch.allclose(block(x)[0], y)
    block.train().moe.keep_routing = True
    assert torch.equal(block(x)[1], block.moe.last_routing.balance_loss())


def test_the_mixture_of_networks() -> None:
    names: dict[str, Any] = {
        "nn": nn,
        "RobustMoE": RobustMoE,
        "x": Source(torch.float32).rand(16, 3, 32, 32),
        "y": torch.arange(16) % 10,
    }
    exec(NETWORKS, names)
    names["loss"].backward()
    router, routing = names["router"], names["routing"]
    assert routing.experts.shape == (16, 1) and router[1].weight.grad.abs().max() > 0
    alone = torch.cat([names["experts"][e](x[None]) for e, x in zip(routing.experts[:, 0], names["x"], strict=True)])
    torch.testing.assert_close(names["model"](names["x"]), routing.weights * alone)


def test_the_attack() -> None:
    experts = [nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(4)]
    model = RobustMoE.from_experts(experts, nn.Sequential(nn.Flatten(), nn.Linear(12, 4)))
    names = {"model": model, "x": (x := S.rand(5, 3, 2, 2)), "y": model(x).argmax(1)}  # all of which withstand at first
    exec(ATTACK, names)
    for x_adv in (names["x_adv"], names["x_second"]):
        assert 0 < (x_adv - names["x"]).abs().max() <= 8 / 255
    exec(ROUTE, names)
    assert names["x_route"].shape[0] == names["standing"].sum()


def test_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyautoattack")
    monkeypatch.chdir(tmp_path)
    experts = [nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(2)]
    model = RobustMoE.from_experts(experts, nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))
    names = {"model": model, "x": (x := S.rand(5, 3, 2, 2)), "y": model(x).argmax(1)}
    exec(EVALUATION, names)
    assert (tmp_path / "evaluation" / "report.json").exists() and names["report"].sa.value == 1
    said = capsys.readouterr().out
    for line in (
        "clean accuracy",
        "under PGD",
        "under AutoAttack",
        "under every attack",
        "expert and route, weight 0.1",
    ):
        assert f"\n{line}" in said and f"    {line}" in README.read_text()


def test_the_idea() -> None:
    names = vars(moe_kernels) | {
        "router": nn.Linear(6, 4),
        "k": 2,
        "num_experts": 4,
        "x": S.randn(5, 6),
        "weight": S.randn(4, 7, 6),
        "bias": S.randn(4, 7),
    }
    exec(IDEA, names)
    every = torch.einsum("eoi,ti->teo", names["weight"], names["x"]) + names["bias"]
    chosen = every.gather(1, names["experts"].long()[..., None].expand(-1, -1, 7))
    torch.testing.assert_close(names["y"], (names["weights"][..., None] * chosen).sum(1))
