"""Image data sets in [0, 1] with a held-out split that follows from a seed."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rter.errors import UserError


@dataclass(frozen=True)
class Split:
    """Images x [n, C, H, W] in [0, 1] and labels y [n], int64."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: Tensor | slice) -> "Split":
        return Split(self.x[rows], self.y[rows])


@dataclass(frozen=True)
class Data:
    train: Split
    held_out: Split
    num_classes: int


@functools.cache
def _digits() -> tuple[Split, int]:
    """1,797 real scans of handwritten digits, 8x8, that come with scikit-learn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    return Split(images, torch.from_numpy(digits.target).long()), 10


DATASETS: dict[str, Callable[[], tuple[Split, int]]] = {"digits": _digits}


def load_data(name: str, held_out: int, seed: int) -> Data:
    """Loads a data set and holds out `held_out` of its images, drawn by `seed`."""
    images, num_classes = DATASETS[name]()
    if not 0 < held_out < len(images):
        raise UserError(f"held_out must be between 1 and {len(images) - 1} for {name}, got {held_out}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return Data(images[order[held_out:]], images[order[:held_out]], num_classes)
