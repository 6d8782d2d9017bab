"""SVHN's cropped digits, 3x32x32, in MATLAB 5 files: X [32, 32, 3, n] uint8 and y [n, 1], 1 to 10 with 10 for a zero.

Source: Netzer et al., Reading Digits in Natural Images with Unsupervised Feature Learning, 2011.
"""

import struct
from pathlib import Path

import numpy as np
import torch

from rter.data.files import check_labels, damaged, find_folder, missing, read_bytes
from rter.data.split import Source, Split


def load(folder: Path, image_size: int = 0) -> Source:
    place = find_folder(folder, "svhn", "train_32x32.mat")
    if place is None:
        raise missing("svhn", folder, "train_32x32.mat")
    return Source(_read(place / "train_32x32.mat"), _read(place / "test_32x32.mat"), 10)


def _read(path: Path) -> Split:
    from scipy.io import loadmat

    _check_elements(path)
    try:
        content = loadmat(path, variable_names=("X", "y"))
    except Exception as error:  # scipy raises many kinds on damaged bytes
        raise damaged(path, f"{type(error).__name__}: {error}") from None
    x, y = (np.asarray(content.get(name)) for name in ("X", "y"))
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (32, 32, 3) or y.shape != (x.shape[3], 1):
        raise damaged(path, f"expected X [32, 32, 3, n] uint8 and y [n, 1], got {x.dtype} {x.shape} and {y.shape}")
    check_labels(path, y[:, 0], 1, 10, "image")
    pixels = torch.from_numpy(np.ascontiguousarray(x.transpose(3, 2, 0, 1)))
    return Split(pixels, torch.from_numpy(y[:, 0].astype(np.int64) % 10))


def _check_elements(path: Path) -> None:
    """Checks the lengths of the file's elements, each after a tag of 8 bytes, from the end of the header on."""
    content, at = read_bytes(path), 128
    if len(content) < at or content[126:128] not in (b"IM", b"MI"):
        raise damaged(path, "no MATLAB 5 header in the first 128 bytes")
    order = "<" if content[126:128] == b"IM" else ">"
    while at < len(content):
        length = struct.unpack_from(f"{order}I", content, at + 4)[0] if at + 8 <= len(content) else 0
        if at + 8 + length > len(content) or at + 8 > len(content):
            raise damaged(path, f"the element at byte {at} ends at {at + 8 + length}, the file at {len(content)}")
        at += 8 + length
