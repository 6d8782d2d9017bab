"""Batch norms in eval mode, folded into the convolutions before them.

    bn(conv(x, W) + b) = conv(x, s W) + s (b - mean) + beta,   s = gamma / sqrt(var + eps)

Which convolution feeds a batch norm and nothing else shows when the model first runs. From then on the convolution has
the folded weight and the batch norm does nothing. Should anything else touch such a convolution's result after all, it
gets what it would have been, and the convolution is not folded again.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moe_kernels import _checks as check
from moe_kernels.attacks.rules import alias

FOLDABLE = {F.batch_norm, F.conv1d, F.conv2d, F.conv3d}
ATTRIBUTES = ("device", "dtype", "is_cuda", "layout", "ndim", "requires_grad", "shape")
HARMLESS = {  # what tells nothing of a tensor's values
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.stride, Tensor.is_floating_point, Tensor.is_contiguous),
    *(getattr(Tensor, name).__get__ for name in ATTRIBUTES),
}


class Norm(NamedTuple):
    """The arguments of a batch norm in eval mode."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def of(
        cls,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> "Norm | None":
        if training or running_mean is None or running_var is None:
            return None
        return cls(running_mean, running_var, weight, bias, eps)

    def is_same(self, other: "Norm | None") -> bool:
        return (
            other is not None
            and all(a is b for a, b in zip(self[:4], other[:4], strict=True))
            and self.eps == other.eps
        )

    def tensors(self) -> list[Tensor]:
        return [t for t in self[:4] if t is not None]


class _Fold:
    """A convolution's weight and bias, and the batch norm to be folded into them."""

    def __init__(self, weight: Tensor, bias: Tensor | None, norm: Norm, first: Tensor) -> None:
        self.weight, self.bias, self.norm, self.first = weight, bias, norm, weakref.ref(first)
        self.sources = [weight, *norm.tensors(), *([] if bias is None else [bias])]
        self.versions = [t._version for t in self.sources]

    @cached_property
    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias; channels-last on a CPU, where folding alone saves no time."""
        norm, weight = self.norm, self.weight
        scale = (norm.var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.mean if self.bias is None else self.bias - norm.mean
        bias = shift * scale if norm.bias is None else torch.addcmul(norm.bias, shift, scale)
        last = weight.ndim == 4 and weight.device.type == "cpu"
        weight = weight.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        return weight * scale.view(-1, *[1] * (weight.ndim - 1)), bias

    def holds(self) -> bool:
        return self.versions == [t._version for t in self.sources] and self.first() is None


class _Convolution:
    """What is known of a convolution, by its weight and bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.fold: _Fold | None = None
        self.foldable = True


class _Result(NamedTuple):
    """What a living result came from; `instead` computes what it would be where a batch norm has been folded in."""

    convolution: _Convolution
    instead: Callable[[], Tensor] | None


class Folds:
    """What one mode has seen of convolutions and batch norms; it shows this every use of a tensor."""

    def __init__(self) -> None:
        self._convolutions: dict[tuple[int, int], _Convolution] = {}  # by the ids of weight and bias
        self._results = WeakIdKeyDictionary()

    def __bool__(self) -> bool:
        return bool(self._convolutions)

    def convolution(self, run: Callable[[tuple[Any, ...]], Tensor], args: tuple[Any, ...]) -> Tensor:
        """run(args), a convolution with args = (input, weight, bias, ...), or the folded one if it is known."""
        x, weight, bias, *settings = args
        if not isinstance(weight, torch.nn.Parameter) or check.autocast_is_on(x.device.type):
            return run(args)
        this = self._convolutions.setdefault((id(weight), id(bias)), _Convolution(weight, bias))
        if not this.foldable:
            return run(args)
        if this.fold is None or not this.fold.holds():
            out, instead = run(args), None
        else:
            out, instead = run((x, *this.fold.folded, *settings)), partial(run, args)
        self._results[out] = _Result(this, instead)
        return out

    def batch_norm(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        """F.batch_norm's result, if it has been folded into its input."""
        result = self._results.get(input)
        if result is None:
            return None
        norm = Norm.of(*args, **kwargs)
        this = result.convolution
        if result.instead is not None and this.fold is not None and this.fold.norm.is_same(norm):
            return alias(input)
        if norm is None or this.fold is not None or any(t.dtype != this.weight.dtype for t in norm.tensors()):
            self._never(input, result)
        else:
            this.fold = _Fold(this.weight, this.bias, norm, input)
            if input.is_cuda:
                _ = this.fold.folded  # now rather than in a step that is recorded
        return None

    def used(self, tensors: Sequence[Any]) -> None:
        """Something else than a batch norm uses these."""
        for x in tensors if self._results else ():
            if isinstance(x, list | tuple):
                self.used(x)
            elif isinstance(x, Tensor) and (result := self._results.get(x)):
                self._never(x, result)

    def _never(self, x: Tensor, result: _Result) -> None:
        result.convolution.foldable = False
        del self._results[x]
        if result.instead is not None:
            plain = result.instead()
            x.data = torch.empty_like(plain)  # the batch norm's result has x's memory
            x.copy_(plain)
