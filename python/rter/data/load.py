"""Loads a data set by name, with a held-out split determined by a seed."""

import pkgutil
from pathlib import Path

import torch

from rter.data import DATASETS
from rter.data.split import Data, Source
from rter.errors import UserError


def load_source(name: str, folder: Path, image_size: int = 0) -> Source:
    """All images of a data set, read from the folder; see `load_data`."""
    source: Source = pkgutil.resolve_name(DATASETS[name])(folder, image_size)
    return source


def load_data(
    name: str, held_out: int, seed: int, folder: str = "data", image_size: int = 0, train_images: int = 0
) -> Data:
    """Loads a data set and holds out `held_out` of its training images, drawn by `seed`.

    Args:
        name: one of rter.data.DATASETS.
        held_out: number of images to hold out.
        seed: of the draw.
        folder: where the files are.
        train_images: how many of the others to train on, drawn by the seed in the proportions of the classes; 0: all.
        image_size: pixels to which images in separate files are scaled and cropped; 0 leaves them unchanged.

    Raises:
        UserError: if files are missing, truncated or corrupt; the message names the file and the byte.
    """
    source = load_source(name, Path(folder), image_size)
    images = source.train
    if not 0 < held_out < len(images):
        raise UserError(f"held_out must be between 1 and {len(images) - 1} for {name}, got {held_out}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train = images[order[held_out:]]
    if train_images > len(train):
        raise UserError(f"train_images must be at most {len(train)} besides those held out, got {train_images}")
    if train_images:
        train = train.sample(train_images, seed)
    return Data(train, images[order[:held_out]], source.num_classes, source.test, source.names)
