"""Checks that several processes run together; `python tests/parallel_checks.py RANK SIZE FOLDER` starts one of them.

Every check compares this process's part with a single process that computes the joint batch.
"""

import copy
import functools
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from processes import CHECKS, DIM, E, Processes, check, compare, images, mixture, results, rows, whole
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from moe_kernels import PGD, RobustMoE, attack_mode
from moe_kernels.distributed import ExpertParallel, ddp_ignores_experts, dispatch, parallel_experts
from moe_kernels.testing import assert_matches


@check(2, 4)
def an_mlp(p: Processes) -> None:
    for activation in ("gelu", "swiglu"):
        for recompute in ("none", "activations", "all"):
            moe = mixture(activation, recompute=recompute)
            compare(p, moe, rows(16, DIM), rows(16, DIM, seed=2), torch.float32)


@check(2, 4)
def processes_and_experts_without_rows(p: Processes) -> None:
    moe = mixture()
    with torch.no_grad():
        moe.router.weight[E // 2 :] = moe.router.weight[: E // 2] - 1  # some experts get few rows or none
    x = rows(3 * p.size, DIM).abs()
    compare(p, moe, x, rows(*x.shape, seed=2), torch.float32, uneven=True)
    spread = p.spread(moe)
    assert spread(x[:0]).shape == (0, DIM)
    routing = moe.route(x).fixed(E - 1)  # all rows to one process
    torch.testing.assert_close(spread(x, routing=routing), moe(x, routing=routing))


@check(2, 4)
def image_networks(p: Processes) -> None:
    for recompute in ("none", "activations", "all"):
        moe, x = images(recompute=recompute), rows(2 * p.size, 3, 8, 8)
        compare(p, moe, x, rows(2 * p.size, 5, seed=2), torch.float32)
        one, spread = copy.deepcopy(moe), p.spread(moe)
        one(x), spread(p.own(x))
        for (name, buffer), (_, expected) in zip(spread.named_buffers(), one.named_buffers(), strict=True):
            torch.testing.assert_close(whole(buffer), expected, msg=name)


def transformers_block(implementation: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    from moe_kernels.integrations.transformers import register

    register()
    torch.manual_seed(0)
    sizes = {"hidden_size": DIM, "intermediate_size": 10, "num_local_experts": E}
    block = MixtralSparseMoeBlock(transformers.MixtralConfig(**sizes, experts_implementation=implementation))
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    return block


@check(2)
def transformers_experts(p: Processes) -> None:
    for implementation in ("moe_kernels", "eager"):
        block = transformers_block(implementation)
        x, grad = rows(4, 4, DIM), rows(4, 4, DIM, seed=2)
        low = results(p, copy.deepcopy(block), x, grad, False)
        exact = results(p, copy.deepcopy(block).double(), x.double(), grad.double(), False)
        parallelize_module(block, p.mesh, {"experts": ExpertParallel(average=False)})
        out = results(p, block, p.own(x), p.own(grad), True)
        assert_matches(out, *((p.own(r[0]), p.own(r[1]), *r[2:]) for r in (low, exact)), torch.float32)


@check(2)
def transformers_experts_under_fsdp(p: Processes) -> None:
    """Their first linear map is recomputed from a weight that FSDP2 has freed in between."""
    block, x = transformers_block("moe_kernels"), rows(4, 4, DIM)
    one = copy.deepcopy(block)
    fully_shard(block.experts, mesh=p.mesh)
    fully_shard(block, mesh=p.mesh)
    for model, batch in ((one, x), (block, p.own(x))):
        model(batch).square().mean().backward()
    for (name, parameter), (_, expected) in zip(block.named_parameters(), one.named_parameters(), strict=True):
        torch.testing.assert_close(whole(parameter.grad), expected.grad, rtol=1e-4, atol=1e-5, msg=name)
    grads = []
    for model, batch in ((one, x), (block, p.own(x))):
        leaf = batch.clone().requires_grad_()
        with attack_mode(model):
            grads.append(torch.autograd.grad(model(leaf).square().sum(), leaf)[0])
    torch.testing.assert_close(grads[1], p.own(grads[0]), rtol=1e-4, atol=1e-4)


@check(2, 4)
def steps_of_an_optimiser_beside_ddp(p: Processes) -> None:
    one = nn.Sequential(nn.Linear(DIM, DIM), mixture(), nn.Linear(DIM, 3))
    both = copy.deepcopy(one)
    parallelize_module(both, p.mesh, {"1": ExpertParallel()})
    wrapped = DistributedDataParallel(ddp_ignores_experts(both))
    for i in range(5):
        x, y = rows(4 * p.size, DIM, seed=i), torch.arange(4 * p.size) % 3
        for model, batch, target in ((one, x, y), (wrapped, p.own(x), p.own(y))):
            optimizer = torch.optim.SGD(model.parameters(), 0.5)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), target).backward()
            optimizer.step()
    for (name, parameter), (_, expected) in zip(both.named_parameters(), one.named_parameters(), strict=True):
        torch.testing.assert_close(whole(parameter), expected, rtol=1e-4, atol=1e-6, msg=name)


def on_two_dimensions(moe: nn.Module) -> nn.Module:
    """The mixture on 2 x 2 processes: its experts spread over one dimension, and sharded by FSDP2 over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    both = copy.deepcopy(moe)
    parallelize_module(both, mesh["ep"], ExpertParallel())
    fully_shard(both.experts, mesh=mesh["dp"])
    return fully_shard(both, mesh=mesh["dp", "ep"]._flatten("all"))


@check(4)
def fsdp_on_another_dimension(p: Processes) -> None:
    one = mixture()
    both = on_two_dimensions(one)
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-2) for model in (one, both)]
    for i in range(3):
        x = rows(4 * p.size, DIM, seed=i)
        for model, batch, optimizer in zip((one, both), (x, p.own(x)), optimizers, strict=True):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    for (name, parameter), (_, expected) in zip(both.named_parameters(), one.named_parameters(), strict=True):
        assert isinstance(parameter, DTensor) and parameter.to_local().numel() <= expected.numel() / 2
        torch.testing.assert_close(whole(parameter), expected, rtol=1e-4, atol=1e-5, msg=name)


def attack_equals_one(p: Processes, moe: nn.Module, spread: nn.Module, x: Tensor) -> None:
    """Asserts that input gradients and PGD are those of `moe` on the joint batch, and leave `spread` unchanged."""
    y, grads = torch.arange(len(x)) % 5, []
    for model, batch in ((moe, x), (spread, p.own(x))):
        leaf = batch.clone().requires_grad_()
        with attack_mode(model):
            grads.append(torch.autograd.grad(model(leaf).logsumexp(1).sum(), leaf)[0])
            assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(grads[1], p.own(grads[0]), rtol=1e-4, atol=1e-6)
    before = [whole(t).clone() for t in spread.state_dict().values()]
    attack = functools.partial(PGD, eps=2.0, alpha=0.2, steps=5, norm="L2", random_start=False, best_iterate=False)
    torch.testing.assert_close(attack(spread)(p.own(x), p.own(y)), p.own(attack(moe)(x, y)), rtol=1e-3, atol=1e-5)
    assert all(torch.equal(whole(t), b) for t, b in zip(spread.state_dict().values(), before, strict=True))


@check(2)
def attacks(p: Processes) -> None:
    moe = images().eval()
    attack_equals_one(p, moe, p.spread(moe), rows(4 * p.size, 3, 8, 8).sigmoid())


@check(4)
def attacks_under_fsdp_on_another_dimension(p: Processes) -> None:
    for moe, x in ((mixture("swiglu").eval(), rows(16, DIM)), (images().eval(), rows(16, 3, 8, 8))):
        both = on_two_dimensions(moe)
        attack_equals_one(p, moe, both, x.sigmoid())
        assert all(isinstance(q, DTensor) and q.requires_grad and q.grad is None for q in both.parameters())


@contextmanager
def exchanges() -> Iterator[list[int]]:
    """Counts inside it [all exchanges, exchanges of counts]."""
    seen, exchange = [0, 0], dispatch.all_to_all

    def counted(x: Tensor, *args: Any) -> Tensor:
        seen[0] += 1
        seen[1] += not x.is_floating_point()
        return exchange(x, *args)

    with mock.patch.object(dispatch, "all_to_all", counted):
        yield seen


@check(2)
def counts_are_exchanged_once_for_a_forced_route(p: Processes) -> None:
    moe, x, y = p.spread(mixture()).eval(), rows(4, DIM).sigmoid(), torch.arange(4)
    attack = functools.partial(PGD, moe, steps=6, best_iterate=False)
    for options, routing, counts in (
        ({}, None, 6),
        ({"freeze_routing": True}, None, 1),
        ({}, moe.route(x), 1),
    ):
        with exchanges() as seen:
            attack(**options)(x, y, **({} if routing is None else {"routing": routing}))
        assert seen == [6 * 4 + counts, counts], (options, seen)  # rows go out, come back, and so do gradients


@check(2)
def amp_and_activation_checkpointing(p: Processes) -> None:
    moe, x, grad = mixture("swiglu"), rows(16, DIM), rows(16, DIM, seed=2)
    exact = results(p, copy.deepcopy(moe).double(), x.double(), grad.double(), False)
    spread = p.spread(moe, average=False)
    with torch.autocast("cpu", torch.bfloat16):
        low = results(p, moe, x, grad, False)
        out = results(p, spread, p.own(x), p.own(grad), True)
    assert_matches(out, *((p.own(r[0]), p.own(r[1]), *r[2:]) for r in (low, exact)), torch.bfloat16)
    spread = p.spread(moe)
    expected = results(p, spread, p.own(x), p.own(grad), True)
    again = nn.Module.__new__(type("Checkpointed", (nn.Module,), {}))
    nn.Module.__init__(again)
    again.moe = spread
    again.forward = lambda x: checkpoint(spread, x, use_reentrant=False)
    for g, e in zip(results(p, again, p.own(x), p.own(grad), True), expected, strict=True):
        assert torch.equal(g, e)


@check(2)
def copies_and_repetition(p: Processes) -> None:
    moe, x = p.spread(images()), rows(8, 3, 8, 8)
    first, second = (results(p, m, p.own(x), torch.ones(8 // p.size, 5), True) for m in (moe, copy.deepcopy(moe)))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(parallel_experts(moe)) == 1


@check(2)
def second_derivatives(p: Processes) -> None:
    moe, x = mixture(), rows(8, DIM)

    def curvature(model: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.testing.assert_close(curvature(p.spread(moe), p.own(x)), p.own(curvature(moe, x)), rtol=1e-4, atol=1e-5)


def trained(p: Processes) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = p.spread(mixture())
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model(rows(8, DIM)).square().mean().backward()
    dist.all_reduce(model.router.weight.grad)  # else it rounds differently on each process
    optimizer.step()
    return model, optimizer


@check(2, 4)
def a_checkpoint_is_written(p: Processes) -> None:
    model, optimizer = trained(p)
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=p.folder / "checkpoint")
    expected = {name: whole(t) for name, t in states[0].items()}
    moments = [whole(state["exp_avg"]) for state in optimizer.state.values()]
    if p.rank == 0:
        torch.save((expected, moments), p.folder / "expected.pt")


def read_checkpoint(model: nn.Module, folder: Path) -> None:
    """Reads what `a_checkpoint_is_written` wrote into this model and an optimiser, and compares them."""
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    expected, moments = torch.load(folder / "expected.pt")
    for name, t in model.state_dict().items():
        torch.testing.assert_close(whole(t), expected[name], rtol=0, atol=0, msg=name)
    for moment, expected_moment in zip(optimizer.state.values(), moments, strict=True):
        assert torch.equal(whole(moment["exp_avg"]), expected_moment)


@check(2)
def a_checkpoint_of_other_processes_is_read(p: Processes) -> None:
    read_checkpoint(p.spread(mixture()), p.folder.parent / "4")


@check(2)
def mistakes_are_one_line(p: Processes) -> None:
    def raises(match: str, module: nn.Module, mesh: DeviceMesh) -> None:
        with pytest.raises(ValueError, match=match):
            parallelize_module(module, mesh, ExpertParallel())

    grid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
    raises(r"module must not be parallel already", p.spread(mixture()), p.mesh)
    raises(r"mesh must have a size that divides the 3 experts, got 2", RobustMoE(4, 4, 3), p.mesh)
    raises(
        r"module must have grouped experts, .* got ExpertList",
        RobustMoE.from_experts([nn.Linear(2, 2)] * 2, nn.Linear(2, 2)),
        p.mesh,
    )
    raises(r"module must have grouped experts, .* got Linear", nn.Linear(2, 2), p.mesh)
    with pytest.raises(ValueError, match=r"mesh must have one dimension, such as mesh\['ep'\], got 2"):
        ExpertParallel()._apply(mixture(), grid)
    uneven = p.spread(mixture())
    uneven.router = nn.Linear(DIM, E - 1)
    with pytest.raises(ValueError, match=rf"router must return logits \[..., {E}\]"):
        uneven(rows(2, DIM))


def die(p: Processes) -> None:
    """The last process exits between two forwards; the others must not wait for it forever."""
    moe = p.spread(mixture())
    for step in range(2):
        if step == 1 and p.rank == p.size - 1:
            os._exit(9)
        moe(rows(4, DIM))


def main() -> None:
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=240))
    p, found = Processes(rank, size, folder), {}
    if sys.argv[4:] == ["die"]:
        die(p)
    for name, (sizes, function) in CHECKS.items():
        if size in sizes:
            try:
                function(p)
                found[name] = ""
            except BaseException:  # which torch.distributed.checkpoint raises
                found[name] = traceback.format_exc()
                break  # the others may wait for this process
    (folder / f"{rank}.json").write_text(json.dumps(found))
    if all(not message for message in found.values()):
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
