"""Reads pickles of byte strings, numbers, lists, dicts and numpy byte arrays, without running anything they name.

Every opcode is checked before the pickle is loaded, and the three numpy names that an array needs are replaced by
classes of this file that merely store what they are given.
"""

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from rter.data.files import damaged, read_bytes

OPCODES = {
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "SHORT_BINSTRING",
    "BINSTRING", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT",
    "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE", "BUILD",
}  # fmt: skip


class _DType:
    def __init__(self, name: bytes, *flags: int) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    array: np.ndarray

    def __setstate__(self, state: tuple[int, tuple[int, ...], _DType, bool, bytes]) -> None:
        _, shape, dtype, by_columns, content = state
        if dtype.name != b"u1" or by_columns or math.prod(shape) != len(content):
            raise ValueError(f"an array {shape} of {dtype.name!r} in {len(content)} bytes")
        self.array = np.frombuffer(content, np.uint8).reshape(shape)


NAMES: dict[str, Any] = {
    "numpy.core.multiarray _reconstruct": lambda kind, shape, code: _Array(),
    "numpy ndarray": _Array,
    "numpy dtype": _DType,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return NAMES[f"{module} {name}"]


def read_pickle(path: Path) -> Any:
    """The content of a pickle; its arrays must be uint8.

    Raises:
        UserError: if it is truncated or holds anything but plain values; the message names the byte.
    """
    content, at = read_bytes(path), 0
    try:
        for opcode, argument, position in pickletools.genops(content):
            at = position or 0
            if opcode.name not in OPCODES or (opcode.name == "GLOBAL" and argument not in NAMES):
                raise damaged(path, f"{opcode.name} {argument!r} at byte {at} has no place in a data file, not loaded")
            if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(content):
                raise ValueError(f"memo {argument}")
        value = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, EOFError, pickle.UnpicklingError) as error:
        raise damaged(path, f"not a complete pickle, after byte {at} of {len(content)}: {error}") from None
    return value
