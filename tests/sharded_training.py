"""Run by test_fsdp.py in one or two processes: trains under FSDP2 and DDP with an attack in the loop, and checks that
the attack leaves no trace.

    python tests/sharded_training.py STORE RANK PROCESSES
"""

import copy
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_kernels import PGD, ExpertResNet18, ExpertViT, RobustMoE, attack_mode

Units = Callable[[Any], list[nn.Module]]


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(288, 8),
        nn.Linear(8, 5),
    )


def mixture(experts: Any) -> RobustMoE:
    """A mixture of two experts, which routes an image by its first pixel."""
    router = nn.Linear(3 * 64, 2)
    with torch.no_grad():
        router.weight[:, 0] += torch.tensor([-5, 5])
        router.bias += torch.tensor([2.5, -2.5])
    return RobustMoE.from_experts(experts, nn.Sequential(nn.Flatten(), router))


def plain_experts() -> list[nn.Module]:
    return [nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 5)) for _ in range(2)]


def tokens(recompute: str) -> nn.Module:
    moe = RobustMoE(12, 8, 2, activation="swiglu", recompute=recompute)
    return nn.Sequential(nn.Flatten(2), nn.Flatten(1), nn.Unflatten(1, (16, 12)), moe, nn.Flatten(), nn.Linear(192, 5))


def vit() -> ExpertViT:
    return ExpertViT(2, 5, image_size=8, patch=4, width=8, depth=1, heads=2)


def leaves(model: nn.Module) -> list[nn.Module]:
    """Every module with parameters of its own."""
    return [m for m in model.modules() if m._parameters]


# {name: (the model to train, the modules in it that are sharded on their own)}
MODELS: dict[str, tuple[Callable[[], nn.Module], Units]] = {
    "plain": (plain, lambda net: [net[3]]),
    "plain, every layer": (plain, leaves),
    "resnet, every block": (
        lambda: mixture(ExpertResNet18(2, 5, width=2)),
        lambda moe: [moe.experts, *moe.experts.layer1, *moe.experts.layer3],
    ),
    "resnet, every layer": (lambda: mixture(ExpertResNet18(2, 5, width=2)), lambda moe: leaves(moe.experts)),
    "resnet, all recomputed": (
        lambda: mixture(ExpertResNet18(2, 5, width=2, recompute="all")),
        lambda moe: [moe.router],
    ),
    "vit": (lambda: mixture(vit()), lambda moe: [*moe.experts.blocks, *leaves(moe.experts.blocks)]),
    "mlp": (lambda: tokens("activations"), lambda net: [net[3]]),
    "mlp, experts": (lambda: tokens("activations"), lambda net: [net[3].experts]),
    "mlp, up and down": (lambda: tokens("activations"), lambda net: [net[3].experts.up, net[3].experts.down]),
    "mlp, none recomputed": (lambda: tokens("none"), lambda net: [net[3].experts.up, net[3].experts.down]),
    "mlp, all recomputed": (lambda: tokens("all"), lambda net: [net[3].experts.up, net[3].experts.down]),
    "mlp, experts, all recomputed": (lambda: tokens("all"), lambda net: [net[3].experts]),
    "list": (lambda: mixture(plain_experts()), lambda moe: list(moe.experts)),
}


def attacked(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return PGD(net, steps=2, seed=0)(x, y)


def aside(copied: nn.Module) -> Callable[..., Tensor]:
    """The same attack on an unsharded copy, which leaves no trace in the sharded model whatever it does."""

    def attack(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        copied.load_state_dict({name: whole(t) for name, t in net.state_dict().items()})
        return attacked(copied, x, y)

    return attack


def whole(x: Any) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x.detach()


def train(
    net: nn.Module, attack: Callable[..., Tensor], x: Tensor, y: Tensor, average: bool = False, twice: bool = True
) -> list[Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        x_adv = attack(net, x, y)
        optimizer.zero_grad()
        F.cross_entropy(net(x_adv), y).backward()
        if twice:  # between the gradient and the step
            attack(net, x, y)
        for p in net.parameters() if average else ():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
        optimizer.step()
    with FullyShardedDataParallel.summon_full_params(net):
        return [whole(p).clone() for p in net.parameters()]


def is_thawed_after_an_exception(net: nn.Module, x: Tensor) -> bool:
    """Interrupts a forward in the middle, where FSDP2 leaves whole parameters in place."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    fully_shard(net, reshard_after_forward=False)
    try:
        with attack_mode(net):
            net(x)
            net[1].register_forward_hook(interrupt)
            net(x)
    except KeyboardInterrupt:
        return all(p.requires_grad for p in net.parameters())
    return False


def is_synchronised_after_unequal_attacks(net: nn.Module, rank: int, x: Tensor, y: Tensor) -> bool:
    ddp = DistributedDataParallel(net, process_group=dist.new_group(timeout=timedelta(seconds=20)))
    try:
        found = train(ddp, lambda net, x, y: PGD(net, steps=1 + rank, seed=0)(x, y), x, y)
    except RuntimeError:  # a process waits for a collective that the other does not make
        return False
    first = [p.clone() for p in found]
    for p in first:
        dist.broadcast(p, 0)
    return all(map(torch.equal, found, first))


def main(store: str, rank: int, processes: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, processes), rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    faults = []
    for name, (make, units) in MODELS.items():
        torch.manual_seed(0)
        net = make()
        torch.manual_seed(rank)
        x, y = torch.rand(6, 3, 8, 8), torch.randint(5, (6,))
        x[:, 0, 0, 0] = torch.tensor([0.1, 0.9] * 3) if processes == 1 else 0.1 + 0.8 * rank  # an expert has no rows
        for after_forward in (None, True, False)[name != "plain" :]:

            def sharded(net: nn.Module = net, units: Units = units, after_forward: Any = after_forward) -> nn.Module:
                copied = copy.deepcopy(net)
                for unit in (*reversed(units(copied)), copied):
                    fully_shard(unit, mesh=mesh, reshard_after_forward=after_forward)
                return copied

            try:
                found = train(sharded(), attacked, x, y)
                expected = train(sharded(), aside(copy.deepcopy(net)), x, y)
                same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
                moved = all(not torch.equal(a, b) for a, b in zip(found, net.parameters(), strict=True))
                if not (same and moved):
                    faults.append(f"{name}, reshard_after_forward={after_forward}: {same=}, {moved=}")
            except Exception as error:
                faults.append(f"{name}, reshard_after_forward={after_forward}: {error!r}"[:300])
    if not is_thawed_after_an_exception(plain(), x):
        faults.append("plain, FSDP2: stays frozen after an exception")
    torch.manual_seed(0)
    net = plain()
    options: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
    found = train(
        FullyShardedDataParallel(copy.deepcopy(net), device_mesh=mesh, **options), attacked, x, y, twice=False
    )
    expected = train(net, attacked, x, y, average=True, twice=False)
    if not all(map(torch.equal, found, expected)):
        faults.append("plain, FSDP1: differs")
    net = mixture(plain_experts())
    expected = train(copy.deepcopy(net), attacked, x, y, average=True)
    for static_graph in (False, True):
        found = train(DistributedDataParallel(copy.deepcopy(net), static_graph=static_graph), attacked, x, y)
        if not all(map(torch.equal, found, expected)):
            faults.append(f"list, DDP, {static_graph=}: differs")
    if not is_synchronised_after_unequal_attacks(plain(), rank, x, y):
        faults.append("plain, DDP: attacks of unequal numbers of steps hinder one another")
    dist.barrier()
    dist.destroy_process_group()
    print(*faults, sep="\n", file=sys.stderr, flush=True)
    os._exit(bool(faults))  # as rter.__main__.command does, and for the same reason


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
