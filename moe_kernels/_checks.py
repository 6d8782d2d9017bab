"""Checks of user input: one-line errors that name the argument, what was expected and what came."""

from collections.abc import Iterable, Sequence
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from moe_kernels._torch import autocast_dtype, is_mapped


def describe(x: object) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, Tensor) else repr(x)


def tensor(name: str, x: object, expected: str) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(
            f"{name} must be {expected}, got {type(x).__module__}.{type(x).__name__}".replace("builtins.", "")
        )


def bounds(x: object, equal: bool = False) -> None:
    """(low, high), two numbers."""
    numbers = list(x) if isinstance(x, Sequence | np.ndarray) or (isinstance(x, Tensor) and x.ndim == 1) else []
    valid = len(numbers) == 2 and all(isinstance(n, Real) or (isinstance(n, Tensor) and n.ndim == 0) for n in numbers)
    if not valid or not (numbers[0] <= numbers[1] if equal else numbers[0] < numbers[1]):
        raise ValueError(f"bounds must be (low, high) with low {'<=' if equal else '<'} high, two numbers, got {x!r}")


def ndim(name: str, x: Tensor, expected: int) -> None:
    if x.ndim != expected:
        raise ValueError(f"{name} must have {expected} dimensions, got shape {list(x.shape)}")


def shape(name: str, x: Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    """None in `expected` admits any size."""
    if x.shape != expected and (
        x.ndim != len(expected) or any(e is not None and e != s for e, s in zip(expected, x.shape, strict=True))
    ):
        wanted = ["*" if e is None else e for e in expected]
        raise ValueError(f"{name} must be {meaning}, here {wanted}, got shape {list(x.shape)}")


def floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")


def same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {x.device}")


def same_kind(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """The same device, and the same dtype or one that autocast casts to the same."""
    floating(other_name, other)
    same_device(name, x, other_name, other)
    floating(name, x)
    if x.dtype != other.dtype and autocast_dtype(x) != autocast_dtype(other):
        raise ValueError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {x.dtype}")


def indices(name: str, x: Tensor, like: Tensor, *, ndim: int, like_name: str = "x") -> None:
    if x.dtype != torch.int32 or x.ndim != ndim:
        raise ValueError(f"{name} must be an int32 tensor with {ndim} dimension(s), got {x.dtype} {list(x.shape)}")
    same_device(name, x, like_name, like)


def offsets(x: Tensor, num_experts: int, like: Tensor) -> None:
    if x.dtype != torch.int32 or x.ndim != 1 or x.shape[0] != num_experts + 1:
        raise ValueError(f"offsets must be int32 of shape [{num_experts + 1}] (E + 1), got {describe(x)}")
    same_device("offsets", x, "x", like)


def ranges(offsets: list[int], num_rows: int) -> None:
    """Checks offsets whose values are on the host."""
    if offsets[0] != 0 or offsets[-1] != num_rows or offsets != sorted(offsets):
        raise ValueError(f"offsets must run from 0 to the number of rows {num_rows} and not decrease, got {offsets}")


def may_read(x: Tensor) -> bool:
    """Whether x's values can be read without waiting: on the CPU, and not under torch.compile."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def count(name: str, value: int, least: int) -> int:
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return int(value)


def one_of(name: str, value: object, known: Iterable[str]) -> None:
    if value not in (known := list(known)):
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def model(x: object) -> None:
    if not callable(x):
        raise ValueError(f"model must be a module or a function from x to logits, got {x!r}")


def channels(weight: Tensor) -> None:
    """Checks the weight [E, O, C, kh, kw] of a convolution."""
    if 0 in weight.shape[1:3]:
        raise ValueError(f"weight must have at least one channel O and one C, got shape {list(weight.shape)}")


def pair(name: str, x: int | Sequence[int], least: int) -> list[int]:
    """Two numbers, given as two or as one for both."""
    numbers = list(x) if isinstance(x, Sequence) else [x, x]
    if len(numbers) != 2 or any(not isinstance(n, Integral) or n < least for n in numbers):
        raise ValueError(f"{name} must be one or two integers >= {least}, got {x!r}")
    return [int(n) for n in numbers]


def not_mapped(name: str, x: Tensor) -> None:
    """Refuses a tensor that torch.func.vmap maps over while gradients are taken, as in vmap(grad(...))."""
    if is_mapped(x):
        raise RuntimeError(
            f"{name} must be one tensor for all rows, got one for each sample of torch.func.vmap; differentiate "
            "the batch as a whole, without vmap"
        )
