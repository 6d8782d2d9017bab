"""Experts on two processes: the traffic and the time of a step, by all-to-all and by gathering all rows.

A RobustMoE of 8 experts of width 256 and hidden width 1024, k experts for each of 1024 tokens on each of 2 processes
with one thread, fp32, gloo; for comparison, one process with two threads and the tokens of both. Bytes and messages are
those that the first process sends to the other, counted at the collectives. A step of an attack computes the gradient
of the tokens alone, under a forced route whose counts are known; a step of training also those of all weights.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels import RobustMoE, attack_mode
from moe_kernels.distributed import ExpertParallel
from moe_kernels.distributed.dispatch import CachedByTensor
from moe_kernels.distributed.expert_parallel import local_tensors
from moe_kernels.nn.routing import Routing
from moe_kernels.ops import group_by_expert
from moe_kernels.ops.expert_sum import index_sum

PROCESSES, TOKENS, WIDTH, HIDDEN, EXPERTS, REPEATS = 2, 1024, 256, 1024, 8, 9


class GatheringAll(nn.Module):
    """The alternative: every process gets the rows of all, and sends back what its experts contribute to each row.

    Args:
        moe: the layer, whose experts are already spread over the processes.
        group: the processes.
    """

    def __init__(self, moe: RobustMoE, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.moe, self.group = moe, group
        self.own_slots = CachedByTensor(self._own_slots)

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        routing = self.moe.route(x) if routing is None else routing
        slots, source, offsets = self.own_slots(routing.experts)
        rows = collectives.all_gather_tensor_autograd(x, 0, self.group)
        weights = collectives.all_gather_tensor_autograd(routing.weights, 0, self.group)
        experts: Any = self.moe.experts
        with local_tensors(experts):
            y = experts.own_experts(rows.index_select(0, source), offsets)
        y = y * weights.flatten().index_select(0, slots)[:, None]
        return collectives.reduce_scatter_tensor_autograd(index_sum(y, source, len(rows)), "sum", 0, self.group)

    def _own_slots(self, experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The slots of all processes that go to this one's experts, sorted by expert; their rows; their offsets."""
        own = EXPERTS // PROCESSES
        experts = collectives.all_gather_tensor(experts, 0, self.group).flatten() - own * dist.get_rank(self.group)
        slots = ((experts >= 0) & (experts < own)).nonzero().squeeze(1)
        order, _, offsets = group_by_expert(experts[slots, None], own)
        return slots[order], (slots[order] // self.moe.top_k).int(), offsets


class Sent(TorchDispatchMode):
    """Counts what this process sends to the others while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.messages = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("_c10d_functional::")
        if name == "all_to_all_single":
            self.note(args[0].nbytes // max(len(args[0]), 1) * (sum(args[2]) - args[2][dist.get_rank()]))
        elif name == "all_gather_into_tensor":
            self.note(args[0].nbytes * (PROCESSES - 1))
        elif name == "reduce_scatter_tensor":
            self.note(args[0].nbytes * (PROCESSES - 1) // PROCESSES)
        else:
            assert "c10d" not in func._schema.name or name in ("wait_tensor", "_wrap_tensor_autograd"), func
        return func(*args, **kwargs or {})

    def note(self, sent: int) -> None:
        self.bytes, self.messages = self.bytes + sent, self.messages + PROCESSES - 1


def layer(top_k: int) -> RobustMoE:
    torch.manual_seed(0)
    return RobustMoE(WIDTH, HIDDEN, EXPERTS, top_k)


def tokens(process: int) -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(process), requires_grad=True)


Step = Callable[[], tuple[Tensor, ...]]


def training(model: nn.Module, moe: RobustMoE, x: Tensor) -> Step:
    return lambda: torch.autograd.grad(model(x).square().sum(), [x, *moe.parameters()])


def attack(model: nn.Module, moe: RobustMoE, x: Tensor) -> Step:
    with torch.no_grad():
        routing = moe.route(x)

    def step() -> tuple[Tensor, ...]:
        with attack_mode(model):
            return torch.autograd.grad(model(x, routing=routing).square().sum(), [x])

    return step


def seconds(act: Callable[[], object]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def compare(found: dict[str, list[Tensor]], expected: Tensor) -> None:
    """Checks that all have the same gradients, and that the tokens' gradient is that of one process."""
    first = next(iter(found.values()))
    for name, grads in found.items():
        for g, e in zip([*grads, grads[0]], [*first, expected], strict=True):
            assert (g - e).abs().max() <= 1e-4 * e.abs().max(), name


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,), mesh_dim_names=("ep",))
    x, joint = tokens(rank), torch.cat([tokens(p).detach() for p in range(PROCESSES)]).requires_grad_()
    if rank == 0:
        print("| k | step | rows travel by | bytes sent | messages | ms | of one process |")
        print("| --: | :-- | :-- | --: | --: | --: | --: |")
    for k, case in product((1, 2), (training, attack)):
        moe, one = parallelize_module(layer(k), mesh, ExpertParallel()), layer(k)
        models = {"all-to-all": moe, "all-gather, reduce-scatter": GatheringAll(moe, mesh.get_group())}
        steps, alone = {name: case(model, moe, x) for name, model in models.items()}, case(one, one, joint)
        found, counted = {}, {"one process": "0 | 0"}
        for name, step in steps.items():
            step()
            with Sent() as sent:
                found[name] = [g.to_local() if isinstance(g, DTensor) else g for g in step()]
            counted[name] = f"{sent.bytes:,} | {sent.messages}"
        compare(found, alone()[0].chunk(PROCESSES)[rank])
        times: dict[str, list[float]] = {name: [] for name in (*steps, "one process")}
        for _ in range(REPEATS):  # in turns, since the speed of a machine varies
            for name, step in steps.items():
                dist.barrier()
                times[name].append(seconds(lambda step=step: (step(), dist.barrier())))
            if rank == 0:
                torch.set_num_threads(PROCESSES)
                times["one process"].append(seconds(alone))
                torch.set_num_threads(1)
        if rank == 0:
            median = {name: statistics.median(seen) * 1000 for name, seen in times.items()}
            for name, ms in median.items():
                ratio = ms / median["one process"]
                print(f"| {k} | {case.__name__} | {name} | {counted[name]} | {ms:.1f} | {ratio:.2f} |")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # as rter.__main__.command does, and for the same reason


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        commands = [[sys.executable, __file__, str(rank), folder] for rank in range(PROCESSES)]
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": "ignore::FutureWarning"}
        processes = [subprocess.Popen(command, env=environment) for command in commands]
        sys.exit(max(abs(p.wait()) for p in processes))


if __name__ == "__main__":
    process(int(sys.argv[1]), sys.argv[2]) if sys.argv[1:] else main()
