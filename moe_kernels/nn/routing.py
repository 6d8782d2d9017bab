"""Where each row goes: the router's logits, and the experts and weights chosen from them or forced."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe_kernels import _checks as check
from moe_kernels._torch import inside_transform
from moe_kernels.ops.group_by_expert import Groups, group_by_expert
from moe_kernels.ops.topk_route import topk_route


@dataclass(eq=False, frozen=True, repr=False)
class Routing:
    """One routing of T rows over E experts; a row's route never depends on its batch neighbours.

    Args:
        logits: [..., E], with leading sizes whose product is T.
        weights: [T, k].
        experts: int32 [T, k], in descending order of logit, or of score plus bias, unless forced.
    """

    logits: Tensor
    weights: Tensor
    experts: Tensor

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        k: int,
        gate: str = "softmax",
        renormalize: bool | None = None,
        *,
        bias: Tensor | None = None,
        groups: Sequence[int] | None = None,
        scale: float = 1.0,
    ) -> "Routing":
        """Routes each row of logits [..., E] to its k largest; see `moe_kernels.topk_route`."""
        if logits.ndim == 0 or logits.shape[-1] == 0:
            raise ValueError(f"logits must be [..., E] with E >= 1, got shape {list(logits.shape)}")
        rows = logits.reshape(-1, logits.shape[-1])
        return cls(logits, *topk_route(rows, k, gate, renormalize, bias=bias, groups=groups, scale=scale))

    @classmethod
    def cat(cls, routings: Sequence["Routing"]) -> "Routing":
        """The routings of several batches of rows as that of one batch; all with the same k."""
        if not routings or len({(r.num_experts, r.experts.shape[1]) for r in routings}) != 1:
            shapes = [[*r.logits.shape, r.experts.shape[1]] for r in routings]
            raise ValueError(f"routings must be one or more with equal E and k, got [..., E, k] = {shapes}")
        return cls(
            torch.cat([r.logits for r in routings]),
            torch.cat([r.weights for r in routings]),
            torch.cat([r.experts for r in routings]),
        )

    def __repr__(self) -> str:
        shapes = (f"{name}={list(getattr(self, name).shape)}" for name in ("logits", "weights", "experts"))
        return f"{type(self).__name__}({', '.join(shapes)}, {self.weights.dtype} on {self.weights.device})"

    @property
    def num_experts(self) -> int:
        return self.logits.shape[-1]

    @property
    def groups(self) -> Groups:
        """`moe_kernels.group_by_expert` of the experts, computed once for all forwards that take this route."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or inside_transform():
            return group_by_expert(self.experts, self.num_experts)
        return self._groups

    @cached_property
    def _groups(self) -> Groups:
        return group_by_expert(self.experts, self.num_experts)

    @property
    def load(self) -> Tensor:
        """[E]: the fraction of slots that each expert gets; sums to 1, or to 0 without rows."""
        return self.groups.offsets.diff().to(self.weights.dtype) / max(self.experts.numel(), 1)

    def balance_loss(self, load: Tensor | None = None) -> Tensor:
        """E * sum over the experts of load * mean probability: 1 if they share the rows evenly, E if one gets them all
        (Switch Transformer, eq. 4).

        `load` [E] replaces this routing's own. Given the load of a batch that is spread over several processes, the
        mean of their losses, weighted by rows, is the batch's loss.
        """
        mean = self._wide_logits().softmax(-1).sum(0) / max(self.experts.shape[0], 1)
        return self.num_experts * ((self.load if load is None else load) * mean).sum()

    def z_loss(self) -> Tensor:
        """Mean squared logsumexp of the logits, which keeps them small (ST-MoE, eq. 5)."""
        return self._wide_logits().logsumexp(-1).square().sum() / max(self.experts.shape[0], 1)

    def select(self, i: int | Tensor) -> "Routing":
        """Only the expert of rank i of each row, with weight 1; i may be an integer tensor [T], one rank per row."""
        T, k = self.experts.shape
        if isinstance(i, Tensor):
            if i.shape != (T,) or i.is_floating_point():
                raise ValueError(f"i must be a rank or integers [{T}], one per row, got {i.dtype} {list(i.shape)}")
            if check.may_read(i) and bool(((i < 0) | (i >= k)).any()):
                raise ValueError(f"i must be ranks between 0 and k - 1 = {k - 1}, got {int(i.min())} to {int(i.max())}")
            return self._forced(self.experts.gather(1, i[:, None].long()))
        if isinstance(i, float) or not 0 <= i < k:
            raise ValueError(f"i must be a rank between 0 and k - 1 = {k - 1}, got {i}")
        return self._forced(self.experts[:, i : i + 1])

    def fixed(self, e: int) -> "Routing":
        """Expert e for every row, with weight 1."""
        if isinstance(e, float) or not 0 <= e < self.num_experts:
            raise ValueError(f"e must be an expert between 0 and E - 1 = {self.num_experts - 1}, got {e}")
        return self._forced(torch.full_like(self.experts[:, :1], e))

    def _forced(self, experts: Tensor) -> "Routing":
        return Routing(self.logits, torch.ones_like(experts, dtype=self.weights.dtype), experts)

    def _wide_logits(self) -> Tensor:
        """[T, E] in the weights' dtype, fp32 or wider."""
        return self.logits.reshape(-1, self.num_experts).to(self.weights.dtype)
