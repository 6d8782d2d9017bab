"""Image data sets in [0, 1] with a held-out split that follows from a seed."""

from collections.abc import Callable
from pathlib import Path

import torch

from rter.data import cifar10, digits, folders, svhn
from rter.data.split import Data, Source, Split
from rter.errors import UserError

__all__ = ["DATASETS", "Data", "Source", "Split", "load_data"]

DATASETS: dict[str, Callable[[Path, int], Source]] = {
    "digits": lambda folder, size: digits.load(),
    "cifar10": lambda folder, size: cifar10.load(folder),
    "svhn": lambda folder, size: svhn.load(folder),
    "tiny-imagenet": folders.load_tiny_imagenet,
    "image-folder": folders.load_image_folder,
}


def load_data(
    name: str, held_out: int, seed: int, folder: str = "data", image_size: int = 0, train_images: int = 0
) -> Data:
    """Loads a data set and holds out `held_out` of its training images, drawn by `seed`.

    Args:
        name: one of DATASETS.
        held_out: number of images.
        seed: of the draw.
        folder: where the files are.
        train_images: so many of the others are trained on, drawn by the seed in the proportions of the classes; 0: all.
        image_size: pixels to which images in files of their own are scaled and cropped; 0 takes them as they are.

    Raises:
        UserError: naming the file and the byte, if the files are missing, truncated or corrupt.
    """
    source = DATASETS[name](Path(folder), image_size)
    images = source.train
    if not 0 < held_out < len(images):
        raise UserError(f"held_out must be between 1 and {len(images) - 1} for {name}, got {held_out}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train = images[order[held_out:]]
    if train_images > len(train):
        raise UserError(f"train_images must be at most {len(train)} beside those held out, got {train_images}")
    if train_images:
        train = train.sample(train_images, seed)
    return Data(train, images[order[:held_out]], source.num_classes, source.test, source.names)
