"""Images in files of their own: Tiny-ImageNet-200, and any folder with a folder per class."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from rter.data.files import damaged, find_folder, missing, read_bytes
from rter.data.split import Source, Split
from rter.errors import UserError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
TESTS = ("test", "val")


def load_tiny_imagenet(folder: Path, image_size: int = 0) -> Source:
    """train/<class>/images/*; the validation images, whose labels are published, are the test split."""
    place = find_folder(folder, "tiny-imagenet-200", "wnids.txt")
    if place is None:
        raise missing("tiny-imagenet", folder, "tiny-imagenet-200/wnids.txt")
    labels = {name: i for i, name in enumerate(read_bytes(place / "wnids.txt").decode("ascii", "replace").split())}
    train = [(path, labels[name]) for name in labels for path in _images(place / "train" / name / "images")]
    annotations, test = place / "val" / "val_annotations.txt", []
    for i, line in enumerate(read_bytes(annotations).decode("ascii", "replace").splitlines()):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in labels or Path(fields[0]).name != fields[0]:
            raise damaged(annotations, f"line {i + 1} must be an image and a class of wnids.txt, got {line!r}")
        test.append((place / "val" / "images" / fields[0], labels[fields[1]]))
    return _source(train, test, len(labels), image_size)


def load_image_folder(folder: Path, image_size: int = 0) -> Source:
    """train/<class>/* and test/<class>/* or val/<class>/*, or <class>/* alone; classes by the order of their names."""
    split = (folder / "train").is_dir()
    train = folder / "train" if split else folder
    test = next((folder / name for name in TESTS if split and (folder / name).is_dir()), None)
    names = _classes(train)
    if not names:
        raise UserError(f"{train} must hold a folder of images for each class, found none")
    unknown = set(_classes(test)) - set(names) if test else set()
    if unknown:
        raise UserError(f"{test} must have the classes of {train}, which holds no {', '.join(sorted(unknown))}")
    return _source(_labelled(train, names), _labelled(test, names) if test else [], len(names), image_size)


def _labelled(folder: Path, names: list[str]) -> list[tuple[Path, int]]:
    found = _classes(folder)
    return [(path, i) for i, name in enumerate(names) if name in found for path in _images(folder / name)]


def _classes(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".") if folder.is_dir() else []


def _images(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not found:
        raise UserError(f"{folder} must hold images ({', '.join(SUFFIXES)}), found none")
    return found


def _source(train: list[tuple[Path, int]], test: list[tuple[Path, int]], num_classes: int, image_size: int) -> Source:
    files = [*train, *test]
    with ThreadPoolExecutor() as pool:
        arrays = pool.map(lambda file: _read(file[0], image_size), files)
        images = _stack([path for path, _ in files], tqdm(arrays, "images", len(files), leave=False, disable=None))
    every = Split(images, torch.tensor([label for _, label in files]))
    return Source(every[: len(train)], every[len(train) :] if test else None, num_classes)


def _stack(paths: Sequence[Path], arrays: "tqdm[np.ndarray]") -> torch.Tensor:
    """[H, W, 3] arrays, all of the first one's size -> [n, 3, H, W]."""
    stacked = torch.empty(0)
    for i, array in enumerate(arrays):
        image = torch.from_numpy(array).permute(2, 0, 1)
        if i == 0:
            stacked = torch.empty(len(paths), *image.shape, dtype=torch.uint8)
        if image.shape != stacked.shape[1:]:
            sizes = [f"{s[-1]}x{s[-2]}" for s in (image.shape, stacked.shape)]
            raise UserError(f"{paths[i]} is {sizes[0]} where {paths[0]} is {sizes[1]}: give --image-size")
        stacked[i] = image
    return stacked


def _read(path: Path, image_size: int) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with path.open("rb") as file:
            try:
                Image.open(file).verify()
                file.seek(0)
                image = Image.open(file).convert("RGB")
            except Exception as error:  # Pillow raises many kinds on damaged bytes
                stopped = f"stopped at byte {file.tell()} of {path.stat().st_size}"
                raise damaged(path, f"{stopped}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if image_size:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.array(image)
