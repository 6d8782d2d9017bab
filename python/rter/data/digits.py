"""1,797 real scans of handwritten digits, 8x8 in 17 grey levels, that come with scikit-learn."""

import functools
from pathlib import Path

import torch

from rter.data.split import Source, Split


def load(folder: Path | None = None, image_size: int = 0) -> Source:
    """The digits, which need no folder and have a fixed size."""
    return _load()


@functools.cache
def _load() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    return Source(Split(pixels, torch.from_numpy(digits.target).long(), levels=16), None, 10)
