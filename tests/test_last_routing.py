"""RobustMoE keeps the routing of its last forward, under checkpoints, compile, DDP and attacks, with its gradient."""

import copy
import gc
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from moe_kernels import PGD, RobustMoE


class Net(nn.Module):
    """A classifier with a mixture inside, whose routing does not show in its result."""

    def __init__(self, gate: str = "softmax", top_k: int = 2, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first, self.moe = nn.Linear(6, 8), RobustMoE(8, 12, 4, top_k, gate=gate)
        self.moe.keep_routing = True
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.reentrant is None:
            return self.moe(h)
        y: Tensor = checkpoint(self.moe, h, use_reentrant=self.reentrant)
        return y

    def shown(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Result and balance loss, computed with an explicit routing."""
        h = self.first(x)
        routing = self.moe.route(h)
        return self.moe(h, routing=routing), routing.balance_loss()


def gradients(net: Net, run: Any, x: Tensor) -> list[Tensor]:
    """Gradients of the result of run(x) plus the balance loss of the mixture inside."""
    net.zero_grad()
    (run(x).square().mean() + net.moe.last_routing.balance_loss()).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]


def expected(net: Net, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    y, balance = net.shown(x)
    (y.square().mean() + balance).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]


@pytest.fixture(params=["softmax", "hard"])
def net(request: pytest.FixtureRequest) -> Net:
    return Net(request.param, 2 if request.param == "softmax" else 1)


X = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))


def test_is_the_routing_of_the_last_forward_in_training_mode(net: Net) -> None:
    with pytest.raises(RuntimeError, match=r"^last_routing needs keep_routing = True, and then a forward in training"):
        _ = net.moe.last_routing
    assert all(map(torch.equal, gradients(net, net, X), expected(net, X)))
    assert net.moe.router.weight.grad is not None and net.moe.router.weight.grad.abs().max() > 0
    net(X)
    kept = net.moe.last_routing
    assert torch.equal(kept.experts, net.moe.route(net.first(X)).experts) and kept.logits.requires_grad
    PGD(net, 0.1, 0.05, 2)(X.sigmoid(), torch.arange(9) % 8)
    net.eval()(X[:3])
    assert net.moe.last_routing.logits is kept.logits
    forced = net.moe.route(net.first(X)).fixed(1)
    net.train().moe(net.first(X), routing=forced)
    assert net.moe.last_routing.logits is forced.logits and (net.moe.last_routing.experts == 1).all()


def test_under_checkpoints(net: Net) -> None:
    wanted = expected(net, X)
    net.reentrant = False
    assert all(map(torch.equal, gradients(net, net, X), wanted))
    kept = net.moe.last_routing.logits
    net(X).sum().backward()
    assert net.moe.last_routing.logits is not kept  # the forward's, not that of the backward's repetition
    net.reentrant = True  # its forward runs without grad
    net(X)
    with pytest.raises(RuntimeError, match="outside checkpoints with use_reentrant=True"):
        _ = net.moe.last_routing


def test_a_forward_repeated_by_a_checkpoint_is_not_kept(net: Net) -> None:
    net.reentrant = False
    y = net(X)
    kept = net.moe.last_routing.logits
    y.sum().backward()
    assert net.moe.last_routing.logits is kept


@pytest.mark.parametrize("reentrant", [None, False])
def test_under_compile(net: Net, reentrant: bool | None) -> None:
    torch._dynamo.reset()
    net.reentrant = reentrant
    compiled = torch.compile(net, backend="aot_eager", fullgraph=reentrant is None)
    for x in (X, X[:4], X):
        for found, wanted in zip(gradients(net, compiled, x), expected(net, x), strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("static", [False, True])
def test_under_ddp(net: Net, tmp_path: Path, static: bool) -> None:
    wanted = expected(net, X)
    store = distributed.FileStore(str(tmp_path / "store"), 1)

    def train() -> None:
        ddp = DistributedDataParallel(net, static_graph=static)
        for _ in range(2):
            assert all(map(torch.equal, gradients(net, ddp, X), wanted))

    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        train()
    finally:
        gc.collect()  # DDP's reducer goes before the group: as its last owner, with the GIL, it can wait for ever
        distributed.destroy_process_group()


def test_copies_and_saved_layers_have_none(net: Net) -> None:
    net(X)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert torch.equal(other.eval()(X), net.eval()(X)) and other.moe.keep_routing
        with pytest.raises(RuntimeError, match=r"^last_routing needs"):
            _ = other.moe.last_routing
    assert "_kept" not in net.state_dict()
