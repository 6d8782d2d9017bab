"""Batch norms in eval mode, folded into the convolutions before them.

    bn(conv(x, W) + b) = conv(x, s W) + s (b - mean) + beta,   s = gamma / sqrt(var + eps)

Which convolution feeds a batch norm and nothing else shows when the model first runs. From then on the convolution has
the folded weight and the batch norm does nothing; on a CPU it is computed by Winograd's algorithm where that saves
work. Should anything else touch such a convolution's result after all, it gets what it would have been, and the
convolution is not folded again. Grouped ones, with a leading dimension of experts, are folded as plain ones are.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moe_kernels import _checks as check
from moe_kernels.attacks.rules import alias, each
from moe_kernels.ops.winograd_conv2d import is_emulated, saves_work, winograd_conv2d

GROUPED_CONVOLUTIONS = {torch.ops.moe_kernels.expert_conv2d.default, torch.ops.moe_kernels.winograd_conv2d.default}
GROUPED_BATCH_NORM = torch.ops.moe_kernels.expert_batch_norm_forward.default
BATCH_NORMS = {F.batch_norm, GROUPED_BATCH_NORM}
CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, *GROUPED_CONVOLUTIONS}
LAST = torch.channels_last
ATTRIBUTES = ("device", "dtype", "is_cuda", "layout", "ndim", "requires_grad", "shape")
HARMLESS = {  # what tells nothing of a tensor's values
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.is_contiguous),
    *(getattr(Tensor, name).__get__ for name in ATTRIBUTES),
}


class Norm(NamedTuple):
    """The arguments of a batch norm: those of plain [C], or grouped [E, C] with the offsets of the experts' rows."""

    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    eps: float
    offsets: Tensor | None = None

    @classmethod
    def of(cls, func: Any, *args: Any, **kwargs: Any) -> "Norm":
        return (cls._grouped if func is GROUPED_BATCH_NORM else cls._plain)(*args, **kwargs)

    @classmethod
    def _plain(
        cls,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> "Norm":
        return cls(running_mean, running_var, weight, bias, training, eps)

    @classmethod
    def _grouped(
        cls,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        offsets: Tensor,
        training: bool,
        eps: float,
    ) -> "Norm":
        return cls(running_mean, running_var, weight, bias, training, eps, offsets)

    def folds_into(self, result: "_Result") -> bool:
        known = not self.training and self.mean is not None and self.offsets is result.offsets
        return known and all(t.dtype == result.convolution.weight.dtype for t in self.tensors())

    def is_same(self, other: "Norm") -> bool:
        return all(a is b for a, b in zip(self[:4], other[:4], strict=True)) and self.eps == other.eps

    def tensors(self) -> list[Tensor]:
        return [t for t in self[:4] if t is not None]


Convolve = Callable[[Tensor, Tensor, Tensor], Tensor]  # of input, weight and bias


def _by_winograd(func: Any, x: Tensor, weight: Tensor, *settings: Any) -> Convolve | None:
    """func with these settings, where Winograd's algorithm saves work."""
    defaults: tuple[Any, ...] = (1, 0, 1, 1)
    if func is not F.conv2d:
        return None
    stride, padding, dilation, groups = settings + defaults[len(settings) :]
    if isinstance(padding, str) or each(dilation, 2) != [1, 1] or groups != 1:
        return None
    stride, padding = each(stride, 2), each(padding, 2)
    if not saves_work(x, weight, stride, padding):
        return None

    def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        offsets = torch.tensor([0, len(x)], dtype=torch.int32)
        return winograd_conv2d(x, weight[None], bias[None], offsets, padding)

    return convolve


def _without_autocast(convolve: Convolve) -> Convolve:
    """The same in the dtype of the weight, rounded to autocast's at the end."""

    def rounded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        dtype = check.autocast_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            return convolve(x.to(weight.dtype), weight, bias).to(dtype)

    return rounded


class _Convolution:
    """What is known of a convolution, by its weight and bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.fold: _Fold | None = None
        self.foldable = True


class _Fold:
    """A convolution, and the batch norm to be folded into it."""

    def __init__(self, convolution: _Convolution, norm: Norm, first: Tensor) -> None:
        self.weight, self.bias = convolution.weight, convolution.bias
        self.norm, self.first = norm, weakref.ref(first)
        self.sources = [self.weight, *norm.tensors(), *([] if self.bias is None else [self.bias])]
        self.versions = [t._version for t in self.sources]
        self._folded: dict[bool, tuple[Tensor, Tensor]] = {}

    def folded(self, last: bool) -> tuple[Tensor, Tensor]:
        """Weight, in channels-last or as it is, and bias."""
        if last not in self._folded:
            self._folded[last] = self._fold(self.weight.contiguous(memory_format=LAST) if last else self.weight)
        return self._folded[last]

    def _fold(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        norm, bias = self.norm, self.bias
        assert norm.mean is not None and norm.var is not None
        scale = (norm.var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.mean if bias is None else bias - norm.mean
        shift = shift * scale if norm.bias is None else torch.addcmul(norm.bias, shift, scale)
        return weight * scale.view(*scale.shape, *[1] * (weight.ndim - scale.ndim)), shift

    def holds(self) -> bool:
        return self.versions == [t._version for t in self.sources] and self.first() is None


class _Result(NamedTuple):
    """What a living result came from; `instead` computes what it would be where a batch norm has been folded in."""

    convolution: _Convolution
    offsets: Tensor | None
    instead: Callable[[], Tensor] | None


class Folds:
    """What one mode has seen of convolutions and batch norms; it shows this every use of a tensor."""

    def __init__(self) -> None:
        self._convolutions: dict[tuple[int, int], _Convolution] = {}  # by the ids of weight and bias
        self._results = WeakIdKeyDictionary()
        self.keep_layout = False  # of what is folded, since the model looks at strides

    def __bool__(self) -> bool:
        return bool(self._convolutions)

    def convolution(self, func: Any, run: Callable[[tuple[Any, ...]], Tensor], args: tuple[Any, ...]) -> Tensor:
        """run(args), which is func(*args) with args = (input, weight, bias, ...), or the folded one if it is known."""
        x, weight, bias, *settings = args
        if not isinstance(weight, torch.nn.Parameter):
            return run(args)
        autocast = check.autocast_is_on(x.device.type)
        if autocast and not is_emulated(x):
            return run(args)
        winograd = _by_winograd(func, x, weight, *settings)
        this = self._convolutions.setdefault((id(weight), id(bias)), _Convolution(weight, bias))
        if not this.foldable:
            return run(args)
        if this.fold is None or not this.fold.holds():
            out, instead = run(args), None
        else:
            last = x.device.type == "cpu" and weight.ndim == 4 and not self.keep_layout
            convolve = winograd or (lambda *tensors: run((*tensors, *settings)))
            convolve = _without_autocast(convolve) if autocast else convolve
            x = x.contiguous(memory_format=LAST) if last and winograd else x
            out, instead = convolve(x, *this.fold.folded(last and not winograd)), partial(run, args)
        self._results[out] = _Result(this, settings[0] if func in GROUPED_CONVOLUTIONS else None, instead)
        return out

    def batch_norm(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """func's result, if it has been folded into its input."""
        result = self._results.get(input)
        if result is None:
            return None
        norm, this = Norm.of(func, *args, **kwargs), result.convolution
        if not norm.folds_into(result):
            self._never(input, result)
        elif this.fold is not None:
            if result.instead is not None and this.fold.norm.is_same(norm):
                return alias(input) if norm.offsets is None else (alias(input), norm.mean, norm.var)
            self._never(input, result)
        else:
            this.fold = _Fold(this, norm, input)
            if input.is_cuda:
                this.fold.folded(False)  # now rather than in a step that is recorded
        return None

    def used(self, tensors: Sequence[Any]) -> None:
        """Something else than a batch norm uses these."""
        for x in tensors if self._results else ():
            if isinstance(x, list | tuple):
                self.used(x)
            elif isinstance(x, Tensor) and (result := self._results.get(x)):
                self._never(x, result)

    def exposed(self, tensor: Tensor) -> None:
        """This may change unnoticed."""
        for convolution in self._convolutions.values():
            if convolution.fold is not None and any(tensor is t for t in convolution.fold.sources):
                convolution.foldable = False

    def close(self) -> None:
        """No more is folded; a convolution's result that somebody has kept gets its own values."""
        for x, result in list(self._results.items()):
            self._never(x, result)

    def _never(self, x: Tensor, result: _Result) -> None:
        result.convolution.foldable = False
        del self._results[x]
        if result.instead is not None:
            with torch.inference_mode(False), torch.enable_grad():
                plain = result.instead()
                x.data = torch.empty_like(plain)  # the batch norm's result has x's memory
                x.copy_(plain)
