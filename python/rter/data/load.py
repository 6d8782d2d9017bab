"""Loads a data set by name, with a held-out split determined by a seed."""

import pkgutil
from pathlib import Path

import torch

from rter.data import DATASETS
from rter.data.split import Data, Source
from rter.errors import UserError, did_you_mean


def load_source(name: str, folder: Path, image_size: int = 0) -> Source:
    """All images of a data set, read from the folder; see `load_data`."""
    if name not in DATASETS:
        raise UserError(f"name must be one of {', '.join(DATASETS)}, got {name!r}{did_you_mean(str(name), DATASETS)}")
    source: Source = pkgutil.resolve_name(DATASETS[name])(folder, image_size)
    return source


def load_data(
    name: str, held_out: int, seed: int, folder: str = "data", image_size: int = 0, train_images: int = 0
) -> Data:
    """Loads a data set and holds out `held_out` of its training images, drawn by `seed`.

    Args:
        name: a data set, as `rter train --data` names it.
        held_out: number of images to hold out.
        seed: of the draw.
        folder: where the files are.
        train_images: how many of the others to train on, drawn by the seed in the proportions of the classes; 0: all.
        image_size: pixels to which images in separate files are scaled and cropped; 0 leaves them unchanged.

    Returns:
        The images in three splits: `train`, `held_out` and `test`, which is the data set's own test split or, if it has
        none, `held_out`. Of each, `x` are the images [n, C, H, W] in [0, 1], converted from bytes on every access, and
        `y` their classes [n]; `split[:100]` is that of the first 100. `num_classes` and `names` describe the classes.

    Raises:
        UserError: if the name is unknown, or held_out or train_images is out of range; if files are missing, truncated
            or corrupt, in which case the message names the file and the byte.
    """
    source = load_source(name, Path(folder), image_size)
    images = source.train
    if not 0 < held_out < len(images):
        raise UserError(f"held_out must be between 1 and {len(images) - 1} for {name}, got {held_out}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train = images[order[held_out:]]
    if not 0 <= train_images <= len(train):
        raise UserError(f"train_images must be 0 to {len(train)} besides those held out, got {train_images}")
    if train_images:
        train = train.sample(train_images, seed)
    return Data(train, images[order[:held_out]], source.num_classes, source.test, source.names)
