"""Several processes as one: each computes its share of the same joint batch."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

from rter.errors import UserError


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Joins the processes that torchrun started, if it did."""
    if num_processes() == 1:
        yield
        return
    store, rank, size = next(distributed.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # its store keeps the addresses of killed processes
    distributed.init_process_group(
        store=distributed.PrefixStore(attempt, store),
        rank=rank,
        world_size=size,
        timeout=timedelta(hours=12),  # the others wait while the first one evaluates
    )
    yield
    distributed.destroy_process_group()


def choose_device(name: str | None = None) -> torch.device:
    """Where this process computes: "cpu", "cuda" or "cuda:N"; None is a GPU, if there is one. It becomes the current.

    Of several processes that torchrun started on a machine, each has the GPU of its own number.
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
        raise UserError(f"device must be one of the {count} GPUs that torch {torch.__version__} finds, got {name!r}")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and reports."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    if distributed.is_initialized():
        distributed.barrier()


@dataclass(frozen=True)
class Share:
    """Rows start to stop of a joint batch of `total` rows: those that this process computes."""

    start: int
    stop: int
    total: int

    @classmethod
    def of(cls, total: int) -> "Share":
        """This process's share; all are equal but for one row."""
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
        """For a batch of `rows`, one or several copies of this share: the joint batch's rows, and which are ours."""
        copies = rows // (self.stop - self.start)
        ours = torch.arange(self.start, self.stop)
        return copies * self.total, (torch.arange(copies)[:, None] * self.total + ours).flatten()

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Turns means over this share into means over the joint batch, in place."""
        if self.alone or not tensors:
            return
        joint = torch.cat([tensor.flatten() for tensor in tensors]) * ((self.stop - self.start) / self.total)
        distributed.all_reduce(joint)
        for tensor, mean in zip(tensors, joint.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether any process says so."""
        if self.alone:
            return flag
        said = torch.tensor(int(flag), device=device)
        distributed.all_reduce(said, distributed.ReduceOp.MAX)
        return bool(said.item())

    def mean_gradients_(self, weights: Sequence[nn.Parameter]) -> None:
        """Turns the gradients of a mean over this share into those over the joint batch.

        A weight that no process used keeps the gradient None, as in one process.
        """
        if self.alone:
            return
        used = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.uint8)
        used = used.to(weights[0].device)
        distributed.all_reduce(used, distributed.ReduceOp.MAX)
        shared = [weight for weight, by_any in zip(weights, used.tolist(), strict=True) if by_any]
        for weight in shared:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        self.mean_([weight.grad for weight in shared if weight.grad is not None])
