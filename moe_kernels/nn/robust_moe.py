"""The robust Mixture-of-Experts layer: route, sort by expert, run all experts at once, combine."""

from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_kernels import _checks as check
from moe_kernels import _fsdp as fsdp
from moe_kernels._torch import active_ddp, inside_backward
from moe_kernels.nn.experts import ExpertMLP
from moe_kernels.nn.hub import HubMixin
from moe_kernels.nn.routing import Routing
from moe_kernels.ops.combine import combine, gather_rows
from moe_kernels.ops.topk_route import GATES, check_groups


class ExpertList(nn.ModuleList):
    """Any modules as one grouped network: each runs on its own rows, one after the other (the host waits for offsets).

    A module without rows does not run, except on an empty batch if FSDP2 shards it over processes, which must all run
    it. In DistributedDataParallel its gradient is zero, so that find_unused_parameters need not be set.
    """

    @property
    def num_experts(self) -> int:
        return len(self)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, ...] sorted by expert, offsets int32 [E + 1] -> [N, ...].

        Raises:
            ValueError: if an expert does not return a tensor with a row for each of its rows, or their shapes differ.
        """
        rows = [slice(a, b) for a, b in pairwise(offsets.tolist())]
        together = bool(fsdp.units(self)) and dist.is_initialized() and dist.get_world_size() > 1
        run = [e for e, own in enumerate(rows) if together or own.stop > own.start] or [0]
        outputs = {e: self[e](x[rows[e]]) for e in run}
        _check_outputs(outputs, rows)
        return torch.cat([*outputs.values(), *self._empty_rows_of_idle_experts(outputs)])

    def _empty_rows_of_idle_experts(self, outputs: dict[int, Tensor]) -> list[Tensor]:
        """If DDP waits for a gradient of every parameter: for each parameter of the experts that did not run, an empty
        output [0, ...] that gives it a gradient of zero."""
        ddp = active_ddp()
        if ddp is None or ddp.find_unused_parameters or not torch.is_grad_enabled():
            return []
        like = next(iter(outputs.values()))
        idle = [p for e, expert in enumerate(self) if e not in outputs for p in expert.parameters() if p.requires_grad]
        return [p.flatten()[:0].to(like.dtype).view(0, *like.shape[1:]) for p in idle]


def _check_outputs(outputs: dict[int, Tensor], rows: list[slice]) -> None:
    for e, y in outputs.items():
        count = rows[e].stop - rows[e].start
        if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != count:
            came = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"experts[{e}] must return a tensor with a row for each of its {count} rows, got {came}")
    if len({y.shape[1:] for y in outputs.values()}) > 1:
        shapes = ", ".join(f"{list(y.shape[1:])} of experts[{e}]" for e, y in outputs.items())
        raise ValueError(f"experts must return rows of one shape, got {shapes}")


class RobustMoE(nn.Module, HubMixin):
    """A drop-in feed-forward block: y = sum over the top_k experts e of weight_e(x) * expert_e(x).

    Dropless and deterministic: every row reaches its experts whatever its batch neighbours are. Where huggingface_hub
    is installed, a layer made from plain arguments has `save_pretrained`, `from_pretrained` and `push_to_hub`.

    Args:
        dim: width of x.
        hidden_dim: width between an expert's two linear maps.
        num_experts: number of experts E.
        top_k: experts per row, 1 to E.
        activation: relu, gelu, silu, relu2, swiglu or geglu.
        bias: whether the experts' linear maps have biases.
        gate: softmax, sigmoid, hard, straight_through or soft; see `moe_kernels.topk_route`.
        renormalize: whether the top_k weights are divided by their sum; None means top_k > 1.
        router: a module that maps x to logits [..., E]; None for a linear map without bias.
        device, dtype: those of the parameters.
        recompute: "none", "activations" or "all": what the backward recomputes, see `moe_kernels.ExpertMLP`.
        shared_experts: number of experts that every row reaches with weight 1 besides its top_k; they are one MLP of
            width shared_experts * hidden_dim (DeepSeekMoE).
        balance_bias: whether there is a buffer `expert_bias` [E], zero at first, which is added to the gate's scores
            when experts are chosen, and which `update_bias` adjusts to even out the load (DeepSeek-V3).
        groups: (n, m): each row chooses from m of n groups of neighbouring experts; see `moe_kernels.topk_route`.
        scale: multiplies the weights of the top_k experts.

    Attributes:
        keep_routing: whether a forward in training mode keeps its routing as `last_routing`; False unless set.

    Raises:
        ValueError: if a size, top_k or an option is out of range.
    """

    shared: ExpertMLP | None
    expert_bias: Tensor | None
    keep_routing = False
    _kept: tuple[Tensor, Tensor, Tensor] | None = None

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int = 2,
        *,
        activation: str = "gelu",
        bias: bool = True,
        gate: str = "softmax",
        renormalize: bool | None = None,
        router: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recompute: str = "activations",
        shared_experts: int = 0,
        balance_bias: bool = False,
        groups: Sequence[int] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.dim: int | None = dim
        self.router_given = router is not None
        experts = ExpertMLP(num_experts, dim, hidden_dim, activation, bias, device, dtype, recompute=recompute)
        if router is None:
            router = nn.Linear(dim, num_experts, bias=False, device=device, dtype=dtype)
        self._assemble(experts, router, top_k, gate, renormalize, balance_bias, groups, scale)
        if check.count("shared_experts", shared_experts, 0):
            width = shared_experts * hidden_dim
            self.shared = ExpertMLP(1, dim, width, activation, bias, device, dtype, recompute=recompute)

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module | Sequence[nn.Module],
        router: nn.Module,
        top_k: int = 1,
        gate: str = "softmax",
        renormalize: bool | None = None,
        *,
        balance_bias: bool = False,
        groups: Sequence[int] | None = None,
        scale: float = 1.0,
    ) -> "RobustMoE":
        """A mixture of any experts.

        Args:
            experts: a grouped network, with `num_experts` and `forward(x_sorted, offsets)`, or a list of modules, which
                run one after the other, each on its own rows. An expert without rows has a gradient of zero under DDP,
                and runs on an empty batch if FSDP2 shards it over several processes.
            router: maps x to logits [..., E]; the leading dimensions of the logits are those that are routed, so a
                router that returns [B, E] routes whole images.
            top_k, gate, renormalize, balance_bias, groups, scale: as for `RobustMoE`.

        Raises:
            ValueError: if the experts or the router are no modules, or top_k or an option is out of range.
        """
        if isinstance(experts, Iterable) and (type(experts) is nn.ModuleList or not isinstance(experts, nn.Module)):
            experts = list(experts)
            for i, expert in enumerate(experts):
                if not isinstance(expert, nn.Module):
                    raise ValueError(f"experts[{i}] must be a module, got {type(expert).__name__}")
            experts = ExpertList(experts)
            if not experts:
                raise ValueError("experts must be at least one module, got none")
        if not hasattr(experts, "num_experts"):
            raise ValueError(
                "experts must be a list of modules or a grouped network with the attribute num_experts, "
                f"got {type(experts).__name__}"
            )
        moe = cls.__new__(cls)
        nn.Module.__init__(moe)
        moe.dim = None
        moe._assemble(experts, router, top_k, gate, renormalize, balance_bias, groups, scale)
        return moe

    def _assemble(
        self,
        experts: nn.Module,
        router: nn.Module,
        top_k: int,
        gate: str,
        renormalize: bool | None,
        balance_bias: bool,
        groups: Sequence[int] | None,
        scale: float,
    ) -> None:
        self.num_experts = int(experts.num_experts)  # type: ignore[arg-type]
        self._checked(top_k)
        check.one_of("gate", gate, GATES)
        if gate == "soft" and top_k != self.num_experts:
            raise ValueError(f'top_k must be num_experts = {self.num_experts} with gate="soft", got {top_k}')
        if not isinstance(router, nn.Module):
            raise ValueError(f"router must be a module that maps x to logits [..., E], got {router!r}")
        self.experts, self.router = experts, router
        self.top_k, self.gate, self.renormalize = top_k, gate, renormalize
        if groups is not None:
            check_groups(groups, self.num_experts, top_k)
        self.groups, self.scale = groups, scale
        self.shared = None
        parameter = next(chain(router.parameters(), experts.parameters()), None)
        device = None if parameter is None else parameter.device
        self.register_buffer("expert_bias", torch.zeros(self.num_experts, device=device) if balance_bias else None)

    def route(self, x: Tensor, top_k: int | None = None) -> Routing:
        """The routing that forward(x) would take, or the one to `top_k` experts instead.

        Raises:
            ValueError: if x or the router's logits have another size, or x another dtype or device.
        """
        check.tensor("x", x, "a tensor")
        if self.dim is not None and x.shape[-1:] != (self.dim,):
            raise ValueError(f"x must have {self.dim} features, got shape {list(x.shape)}")
        if self.dim is not None:
            check.floating("x", x)
        if type(self.router) is nn.Linear and type(self.router.weight) is nn.Parameter:
            check.same_kind("x", x, "the router's weight", self.router.weight)
        try:
            logits = self.router(x)
        except RuntimeError as error:
            if "shapes cannot be multiplied" not in str(error):
                raise
            raise ValueError(
                f"router must map x {list(x.shape)} to logits [..., {self.num_experts}], and its linear map does not "
                "fit x: is an nn.Flatten missing in front of it?"
            ) from error
        if logits.shape[-1] != self.num_experts:
            raise ValueError(f"router must return logits [..., {self.num_experts}], got shape {list(logits.shape)}")
        k = self.top_k if top_k is None else self._checked(top_k)
        options: dict[str, Any] = {"bias": self.expert_bias, "groups": self.groups, "scale": self.scale}
        return Routing.from_logits(logits, k, self.gate, self.renormalize, **options)

    def _checked(self, top_k: int) -> int:
        if isinstance(top_k, float) or not 1 <= top_k <= self.num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts = {self.num_experts}, got {top_k!r}")
        return top_k

    @property
    def last_routing(self) -> Routing:
        """The routing that the last forward in training mode took, for auxiliary losses of a layer deep in a model.

        `keep_routing` must be set before that forward. Forwards in eval mode, such as an attack's, do not replace it,
        nor do those that a checkpoint repeats in the backward. Copies and saved layers do not contain it.

        Raises:
            RuntimeError: if there is none, or none with a gradient.
        """
        if self._kept is None:
            problem = "a forward in training mode with gradients, outside checkpoints with use_reentrant=True"
            raise RuntimeError(f"last_routing needs keep_routing = True, and then {problem}")
        return Routing(*self._kept)

    def __getstate__(self) -> dict[str, Any]:
        """Without the routing, which belongs to one forward."""
        return {name: value for name, value in vars(self).items() if name != "_kept"}

    def reset_parameters(self) -> None:
        """Resets the layer's own state, `expert_bias`."""
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    @torch.no_grad()
    def update_bias(self, load: Tensor, rate: float = 1e-3) -> None:
        """Lowers the bias of the experts whose load [E] is above the mean by `rate`, and raises it for those below, as
        DeepSeek-V3 does after each training step; `load` is that of the batch, over all processes. ValueError if the
        layer has no balance_bias, or load is not [E]."""
        if self.expert_bias is None:
            raise ValueError("update_bias needs a layer with balance_bias=True")
        check.shape("load", load, (self.num_experts,), "[E]")
        self.expert_bias += rate * (load.mean() - load).sign()

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """Routes x, or sends it where `routing` says: x [..., dim] -> [..., dim], images [B, ...] -> [B, out].

        Raises:
            ValueError: if x is not a tensor, or `routing` not a Routing or made for other numbers of rows or experts.
        """
        if routing is None:
            routing = self.route(x)
        check.tensor("x", x, "a tensor")
        if not isinstance(routing, Routing):
            raise ValueError(
                "routing must be a Routing, as route(x) returns, or its select or fixed for chosen experts, "
                f"got {check.describe(routing)}"
            )
        lead = routing.logits.shape[:-1]
        if x.shape[: len(lead)] != lead or routing.num_experts != self.num_experts:
            raise ValueError(
                f"routing must be for x's leading shape {list(x.shape[: len(lead)])} and {self.num_experts} experts, "
                f"got logits {list(routing.logits.shape)}"
            )
        if self.keep_routing and self.training and not inside_backward():
            kept = (routing.logits, routing.weights, routing.experts)
            self._kept = kept if torch.is_grad_enabled() else None
        rows = x.reshape(-1, *x.shape[len(lead) :])
        order, position, offsets = routing.groups
        source = order // position.shape[1]  # the row behind each sorted slot
        if getattr(self.experts, "combines", False):
            y = self.experts(rows, offsets, source, routing.weights, position)
        else:
            gathered = gather_rows(rows, source, position)
            y = combine(self.experts(gathered, offsets), routing.weights, position)
        if self.shared is not None:
            y = y + self.shared(rows, len(rows) * torch.arange(2, dtype=torch.int32, device=rows.device))
        return y.reshape(*lead, *y.shape[1:])

    def unsaveable(self) -> str | None:
        """What keeps this layer from being made again from the arguments that `save_pretrained` writes, or None."""
        if self.dim is None:
            return "experts of its own (from_experts)"
        return "a router of its own" if self.router_given else None

    def extra_repr(self) -> str:
        options = f"gate={self.gate!r}, renormalize={self.renormalize}, groups={self.groups}, scale={self.scale}"
        return f"num_experts={self.num_experts}, top_k={self.top_k}, {options}"
