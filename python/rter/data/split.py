"""Images, stored as bytes and used as floats in [0, 1]."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rter.errors import UserError


@dataclass(frozen=True)
class Split:
    """Images and their labels.

    Args:
        pixels: [n, C, H, W], uint8 levels, or floats already in [0, 1].
        y: labels [n], int64.
        levels: the level that stands for 1.
    """

    pixels: Tensor
    y: Tensor
    levels: int = 255

    @property
    def x(self) -> Tensor:
        """Images [n, C, H, W] in [0, 1], converted on every access, so select a batch first."""
        return self.pixels if self.pixels.is_floating_point() else self.pixels.float() / self.levels

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device) -> "Split":
        return Split(self.pixels.to(device), self.y.to(device), self.levels)

    def sample(self, count: int, seed: int) -> "Split":
        """`count` of the images, in their order: drawn by the seed within each class, in the proportions of the classes
        by Sainte-Lague's method. A larger count includes the images of a smaller one.

        Raises:
            UserError: if there are fewer.
        """
        if count > len(self):
            raise UserError(f"images must be at most {len(self)}, all that there are to measure on, got {count}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        sizes = self.y.cpu().bincount()
        by_class = order[self.y.cpu()[order].argsort(stable=True)]
        rank = torch.empty(len(self), dtype=torch.float64)
        rank[by_class] = torch.cat([(torch.arange(int(n)) + 0.5) / n for n in sizes]).double()
        return self[order[rank[order].argsort(stable=True)[:count]].sort().values.to(self.y.device)]

    def __getitem__(self, rows: Tensor | slice) -> "Split":
        return Split(self.pixels[rows], self.y[rows], self.levels)


@dataclass(frozen=True)
class Source:
    """A data set as its files have it: training images, the official test split if there is one, and the names of the
    classes if they are not just numbers."""

    train: Split
    test: Split | None
    num_classes: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Data:
    """The data of a run. `held_out` is drawn from the training images, to choose the best weights on.

    `official_test` is the data set's own test split; without one, the held-out images are also the test.
    """

    train: Split
    held_out: Split
    num_classes: int
    official_test: Split | None = None
    names: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "Data":
        test = None if self.official_test is None else self.official_test.to(device)
        return Data(self.train.to(device), self.held_out.to(device), self.num_classes, test, self.names)

    @property
    def test(self) -> Split:
        """The images of the final evaluation."""
        return self.held_out if self.official_test is None else self.official_test
