"""Sends rows to the processes of their experts, and the results back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.weak import WeakIdKeyDictionary

from moe_kernels._torch import all_to_all, version
from moe_kernels.ops import Groups, group_by_expert

T = TypeVar("T")


class Dispatcher(Protocol):
    """How rows reach the experts of other processes. Every process calls both methods, in the same order.

    Expert e of E lives on process e // (E / processes).
    """

    def dispatch(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Sends every row to its expert's process.

        Args:
            x: [N, ...], this process's rows sorted by expert, N >= 0.
            offsets: int32 [E + 1].

        Returns:
            The rows of all processes for this process's experts, sorted by expert and then by process; their int32
            offsets [E / processes + 1]; and whatever `combine` needs to send the results back.
        """
        ...

    def combine(self, y: Tensor, sent: Any) -> Tensor:
        """Sends back the results y of the rows that `dispatch` returned -> [N, ...], in the order of its x."""
        ...


class CachedByTensor(Generic[T]):
    """A function of a tensor, whose result is remembered while the tensor is alive and not written to."""

    def __init__(self, function: Callable[[Tensor], T]) -> None:
        self.function = function
        self._known = WeakIdKeyDictionary()

    def __call__(self, x: Tensor) -> T:
        now = None if x.is_inference() else version(x)
        known = self._known.get(x)
        if known is None or known[0] != now:
            self._known[x] = known = now, self.function(x)
        return known[1]


@dataclass(frozen=True, eq=False)
class _Plan:
    """Numbers of rows sent to and received from each process, and `group_by_expert` of the received rows."""

    sent: list[int]
    received: list[int]
    groups: Groups


class AllToAll:
    """A dispatcher that sends rows by one `all_to_all_single` in each direction.

    Another `all_to_all_single`, which the host waits for, exchanges the counts of rows first; once per offsets tensor,
    and so once in a whole attack under a forced route.

    Args:
        mesh: one-dimensional, of P processes.
        num_experts: E, a multiple of P.
    """

    def __init__(self, mesh: DeviceMesh, num_experts: int) -> None:
        self.group = mesh.get_group()
        self.local_experts = num_experts // mesh.size()
        self._plan = CachedByTensor(self._exchange_counts)

    def __deepcopy__(self, memo: Any) -> "AllToAll":
        return self  # a process group cannot be copied

    def dispatch(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, _Plan]:
        plan = self._plan(offsets)
        rows = _Exchange.apply(x, plan.received, plan.sent, self.group)
        groups = plan.groups
        return _Permute.apply(rows, groups.order, groups.position), groups.offsets, plan

    def combine(self, y: Tensor, sent: _Plan) -> Tensor:
        rows = _Permute.apply(y, sent.groups.position, sent.groups.order)
        return _Exchange.apply(rows, sent.sent, sent.received, self.group)

    @torch.no_grad()
    def _exchange_counts(self, offsets: Tensor) -> _Plan:
        counts = offsets.diff()
        each = [self.local_experts] * (len(counts) // self.local_experts)
        theirs = all_to_all(counts, each, each, self.group)  # [P * E / P]
        sent, received = torch.stack([counts, theirs]).view(2, len(each), -1).sum(2).tolist()
        experts = torch.arange(self.local_experts, device=offsets.device).repeat(len(each))
        experts = experts.repeat_interleave(theirs, output_size=sum(received))
        return _Plan(sent, received, group_by_expert(experts, self.local_experts))


class _Exchange(torch.autograd.Function):
    """Sends sent[p] rows to each process p and receives received[p] from it; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.back = sent, received, group
        return all_to_all(x, received, sent, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchange.apply(grad, *ctx.back), None, None, None


class _Permute(torch.autograd.Function):
    """x[order]; `inverse` is the inverse permutation of `order`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, order), None, None
