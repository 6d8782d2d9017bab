"""Several processes as one: each computes its share of the same joint batch."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from moe_kernels import RobustMoE
from moe_kernels.distributed import ExpertParallel
from rter.errors import UserError
from rter.ranks import num_processes


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Joins the processes that torchrun started, if it did."""
    if num_processes() == 1:
        yield
        return
    store, rank, size = next(distributed.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store still has the addresses of killed processes
    distributed.init_process_group(
        store=distributed.PrefixStore(attempt, store),
        rank=rank,
        world_size=size,
        timeout=timedelta(hours=12),  # the others wait while the first one evaluates
    )
    yield
    distributed.destroy_process_group()


def choose_device(name: str | None = None) -> torch.device:
    """The device of this process, made the current one: "cpu", "cuda" or "cuda:N"; None for a GPU, if there is one.

    If torchrun started several processes on a machine, each gets the GPU of its own local rank.
    """
    count, several = torch.cuda.device_count(), num_processes() > 1
    if name is None:
        name = "cuda" if count else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name) or (several and ":" in name):
        raise UserError(f"device must be cpu, cuda{'' if several else ' or cuda:N'}, got {name!r}")
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    number = int(os.environ["LOCAL_RANK"] if several else index or (torch.cuda.current_device() if count else 0))
    if number >= count:
        found = ", ".join(["cpu", *(f"cuda:{number}" for number in range(count))])
        raise UserError(f"device must be one that torch {torch.__version__} finds, here {found}, got {name!r}")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def wait_for_all() -> None:
    if distributed.is_initialized():
        distributed.barrier()


def spread_experts(model: nn.Module, number: int) -> None:
    """Spreads the experts of every mixture over `number` processes, which must be all that there are."""
    if number != num_processes():
        raise UserError(f"expert_parallel must be the number of processes, {num_processes()}, got {number}")
    for moe in [module for module in model.modules() if isinstance(module, RobustMoE)]:
        if moe.num_experts % number:
            raise UserError(f"expert_parallel must divide the {moe.num_experts} experts, got {number}")
        mesh = init_device_mesh(next(moe.parameters()).device.type, (number,), mesh_dim_names=("ep",))
        parallelize_module(moe, mesh, ExpertParallel(average=False))


def whole(t: Tensor) -> Tensor:
    """The tensor itself or, if it is spread over the processes, all of it on each of them."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def as_spread(t: Tensor, like: Tensor) -> Tensor:
    """The whole tensor t, spread as `like` is."""
    if isinstance(like, DTensor) and t.shape == like.shape:
        return distribute_tensor(t.to(like.device), like.device_mesh, like.placements)
    return t


@dataclass(frozen=True)
class Share:
    """The rows from start to stop, of a joint batch of `total` rows, that this process computes."""

    start: int
    stop: int
    total: int

    @classmethod
    def of(cls, total: int) -> "Share":
        """This process's share; shares differ by one row at most."""
        if not distributed.is_initialized():
            return cls.whole(total)
        rank, size = distributed.get_rank(), distributed.get_world_size()
        if total < size:
            raise UserError(f"batch_size must be at least the number of processes, {size}, got {total}")
        return cls(total * rank // size, total * (rank + 1) // size, total)

    @classmethod
    def whole(cls, total: int) -> "Share":
        return cls(0, total, total)

    @property
    def alone(self) -> bool:
        return self.stop - self.start == self.total

    def joint_rows(self, rows: int) -> tuple[int, Tensor]:
        """For a batch of one or more copies of this share: how many rows the joint batch has, and which are ours."""
        copies = rows // (self.stop - self.start)
        ours = torch.arange(self.start, self.stop)
        return copies * self.total, (torch.arange(copies)[:, None] * self.total + ours).flatten()

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Turns means over this share into means over the joint batch, in place."""
        self._sum_(tensors, self.part)

    def _sum_(self, tensors: Sequence[Tensor], factor: float) -> None:
        if self.alone or not tensors:
            return
        joint = torch.cat([tensor.flatten() for tensor in tensors]) * factor
        distributed.all_reduce(joint)
        for tensor, mean in zip(tensors, joint.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process."""
        if self.alone:
            return flag
        said = torch.tensor(int(flag), device=device)
        distributed.all_reduce(said, distributed.ReduceOp.MAX)
        return bool(said.item())

    @property
    def part(self) -> float:
        """The weight of this share in the joint batch's mean."""
        return (self.stop - self.start) / self.total

    def sum_gradients_(self, weights: Sequence[nn.Parameter]) -> None:
        """Sums the gradients over the processes, each of which has that of its share's part of the joint mean.

        A weight that no process used keeps the gradient None, as in one process. Experts that are spread over the
        processes have the gradients of the joint batch already.
        """
        weights = [weight for weight in weights if not isinstance(weight, DTensor)]
        if self.alone or not weights:
            return
        used = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.uint8)
        used = used.to(weights[0].device)
        distributed.all_reduce(used, distributed.ReduceOp.MAX)
        shared = [weight for weight, by_any in zip(weights, used.tolist(), strict=True) if by_any]
        for weight in shared:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        self._sum_([weight.grad for weight in shared if weight.grad is not None], 1.0)
