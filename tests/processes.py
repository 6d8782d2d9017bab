"""Processes that compute together, a list of the checks that they run, and the comparison with a single process."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from moe_kernels import ExpertResNet18, RobustMoE
from moe_kernels.distributed import ExpertParallel
from moe_kernels.testing import Source, assert_matches

DIM, E = 6, 8
# {name: (the numbers of processes that it runs with, the check)}
CHECKS: dict[str, tuple[tuple[int, ...], Callable[["Processes"], None]]] = {}


class Processes:
    """This process and its place among the others."""

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        self.rank, self.size, self.folder = rank, size, folder
        self.mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))

    def spread(self, module: nn.Module, **options: Any) -> nn.Module:
        return parallelize_module(copy.deepcopy(module), self.mesh, ExpertParallel(**options))

    def own(self, joint: Tensor, uneven: bool = False) -> Tensor:
        """This process's part of the joint rows; if `uneven`, the first process has none."""
        if uneven:
            return joint.tensor_split([len(joint) * r // (self.size - 1) for r in range(self.size - 1)])[self.rank]
        return joint.chunk(self.size)[self.rank]


def check(*sizes: int) -> Callable[[Callable[[Processes], None]], None]:
    def note(function: Callable[[Processes], None]) -> None:
        CHECKS[function.__name__] = sizes, function

    return note


def mixture(activation: str = "gelu", **options: Any) -> RobustMoE:
    torch.manual_seed(0)
    return RobustMoE(DIM, 10, E, 2, activation=activation, **options)


def images(**options: Any) -> RobustMoE:
    torch.manual_seed(0)
    router = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    return RobustMoE.from_experts(ExpertResNet18(4, 5, width=2, **options), router, top_k=2)


def rows(*shape: int, seed: int = 1) -> Tensor:
    return Source(torch.float32, seed=seed).randn(*shape)


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def results(p: Processes, moe: nn.Module, x: Tensor, grad: Tensor, spread: bool) -> tuple[Tensor, ...]:
    """Output, input gradient and whole parameter gradients of sum(y * grad), summed over the processes."""
    x = x.detach().requires_grad_()
    y = moe(x)
    grads = torch.autograd.grad(y, [x, *moe.parameters()], grad.to(y.dtype))
    rest = [whole(g) for g in grads[1:]]
    if spread:
        for g, own in zip(rest, grads[1:], strict=True):
            if not isinstance(own, DTensor):
                dist.all_reduce(g)
    return y.detach(), grads[0], *rest


def compare(p: Processes, moe: nn.Module, x: Tensor, grad: Tensor, dtype: torch.dtype, uneven: bool = False) -> None:
    low = results(p, copy.deepcopy(moe), x, grad, False)
    exact = results(p, copy.deepcopy(moe).double(), x.double(), grad.double(), False)
    mine = functools.partial(p.own, uneven=uneven)
    spread = p.spread(moe, average=False)
    for _ in range(2):
        out = results(p, spread, mine(x), mine(grad), True)
        low_own, exact_own = ((mine(r[0]), mine(r[1]), *r[2:]) for r in (low, exact))
        assert_matches(out, low_own, exact_own, dtype)
