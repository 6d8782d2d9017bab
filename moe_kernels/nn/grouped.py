"""The base class of all grouped networks, whose state is that of one plain network per expert."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import _checks as check
from moe_kernels import _fsdp as fsdp
from moe_kernels._torch import capture_autocast, inside_transform, vjp
from moe_kernels.nn.recompute import Recomputing


class GroupedNetwork(nn.Module):
    """A network per expert, called with rows sorted by expert and their offsets.

    Every tensor of its state is the plain network's with a leading expert dimension [E].

    Attributes:
        recompute: "all" if a training step saves only the rows, and its backward recomputes and differentiates one
            expert after the other, so that only one has activations at a time. The host then waits for the offsets.
    """

    num_experts: int
    recompute = "none"

    @abstractmethod
    def logits(self, x: Tensor, offsets: Tensor) -> Tensor:
        """`forward` for all experts at once: x [N, C, H, W] sorted by expert -> logits [N, num_classes]."""

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, C, H, W] sorted by expert -> logits [N, num_classes]."""
        check.ndim("x", x, 4)
        one_by_one = self.recompute == "all" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        one_by_one = one_by_one and not inside_transform()
        if not one_by_one or len(x) == 0 or not any(p.requires_grad for p in self.parameters()):
            return self.recomputing_logits(x, offsets)
        check.offsets(offsets, self.num_experts, x)
        if fsdp.units(self):
            raise ValueError(
                'recompute must not be "all" if the network or a module in it is sharded, since it computes each '
                'expert from slices of whole parameters: call fully_shard only on a module that contains it, got "all"'
            )
        return _ExpertByExpert.apply(self, offsets, x, *self.parameters())

    def recomputing_logits(self, x: Tensor, offsets: Tensor) -> Tensor:
        """The logits of all experts at once; `recompute` decides what is saved for the backward."""
        trained = any(p.requires_grad for p in self.parameters())  # else no layer saves an activation
        with Recomputing(self, trained and self.recompute != "none"):
            return self.logits(x, offsets)

    def with_tensors(self, other: Callable[[Tensor], Tensor]) -> "GroupedNetwork":
        """A copy of this network, in the same mode, with every parameter and buffer t replaced by other(t)."""
        return copy.deepcopy(self, {id(t): other(t) for t in chain(self.parameters(), self.buffers())})

    @staticmethod
    def plain_name(key: str) -> str:
        """This network's name for a tensor that other code may call differently."""
        return key

    def load_state_dicts(self, experts: Sequence[Mapping[str, Tensor]]) -> None:
        """Loads one plain state dict per expert.

        Raises:
            ValueError: if there is not one per expert, or keys are missing, unexpected or of another shape.
        """
        if len(experts) != self.num_experts:
            raise ValueError(f"experts must be {self.num_experts} state dicts, got {len(experts)}")
        named = [{self.plain_name(key): value for key, value in state.items()} for state in experts]
        expected = {key: value[0].shape for key, value in self.state_dict().items()}
        for i, state in enumerate(named):
            self._check(f"experts[{i}]", state, expected)
        self.load_state_dict({key: torch.stack([state[key] for state in named]) for key in expected})

    def state_dicts(self) -> list[dict[str, Tensor]]:
        """One plain state dict per expert, sharing this network's memory."""
        state = self.state_dict()
        return [{key: value[e] for key, value in state.items()} for e in range(self.num_experts)]

    def _check(self, name: str, state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
        shapes = {
            f"{key} {list(state[key].shape)} instead of {list(shape)}"
            for key, shape in expected.items()
            if key in state and state[key].shape != shape
        }
        missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
        faults = {"missing": missing, "unexpected": unexpected, "shapes": shapes}
        message = "; ".join(f"{kind}: {', '.join(sorted(keys))}" for kind, keys in faults.items() if keys)
        if message:
            raise ValueError(f"{name} must be a state dict for one expert of {type(self).__name__}; {message}")


def stage(
    block: Callable[..., nn.Module], depth: int, num_experts: int, before: int, channels: int, stride: int, **to: Any
) -> nn.ModuleList:
    """`depth` blocks in a row, the first of which changes the channels and has the stride."""
    first = block(num_experts, before, channels, stride, **to)
    return nn.ModuleList([first, *(block(num_experts, channels, channels, 1, **to) for _ in range(depth - 1))])


class _ExpertByExpert(torch.autograd.Function):
    """The network's logits, computed for one expert after the other, and recomputed so in the backward."""

    @staticmethod
    def forward(ctx: Any, network: GroupedNetwork, offsets: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.network, ctx.offsets, ctx.autocast = network.with_tensors(_same), offsets, capture_autocast(x.device.type)
        ctx.save_for_backward(x, *parameters)
        check.ranges(bounds := offsets.tolist(), len(x))
        ctx.parts = [(slice(a, b), slice(e, e + 1)) for e, (a, b) in enumerate(pairwise(bounds)) if a < b]
        experts = ((x[rows], network.with_tensors(itemgetter(own))) for rows, own in ctx.parts)
        return torch.cat([expert.recomputing_logits(rows, _offsets_of_one(rows)) for rows, expert in experts])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        parameters = list(ctx.network.parameters())

        def logits(offsets: Tensor, own: slice, x: Tensor, *values: Tensor) -> Tensor:
            given = dict(zip(parameters, values, strict=True))
            with ctx.autocast():  # buffers are copied, since running statistics have been updated already
                network = ctx.network.with_tensors(lambda t: given[t] if t in given else t[own].clone())
                return network.recomputing_logits(x, offsets)

        if torch.is_grad_enabled():
            return None, None, *vjp(partial(logits, ctx.offsets, slice(None)), inputs, (grad,), needed)
        grads = [torch.zeros_like(t) if want else None for t, want in zip(inputs, needed, strict=True)]
        for rows, own in ctx.parts:
            places = [rows, *(own for _ in parameters)]
            leaves = [t[place].detach() for t, place in zip(inputs, places, strict=True)]
            for leaf, total, place in zip(leaves, grads, places, strict=True):
                if total is not None:
                    leaf.requires_grad_().grad = total[place]  # the gradient is added to this slice
            with torch.enable_grad():
                y = logits(_offsets_of_one(leaves[0]), own, *leaves)
            torch.autograd.backward(y, grad[rows], inputs=[leaf for leaf in leaves if leaf.requires_grad])
        return None, None, *grads


def _same(t: Tensor) -> Tensor:
    return t


def _offsets_of_one(x: Tensor) -> Tensor:
    """Offsets that give all rows of x to a single expert."""
    return torch.tensor([0, len(x)], dtype=torch.int32, device=x.device)
