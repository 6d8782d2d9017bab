"""Images in separate files: Tiny-ImageNet-200, and any folder with a subfolder for each class."""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rter.console import Progress, say
from rter.data.files import damaged, find_folder, missing, read_bytes
from rter.data.split import Source, Split
from rter.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
TRAINS = ("train", "training")
TESTS = ("test", "testing", "val", "validation", "valid", "dev", "eval")  # the first one that exists is used
CACHED_FROM = 1000  # images, which take about a second to decode
SIXTEEN_BIT = ("PNG", "PPM")  # formats whose pictures of more than 8 bits Pillow reads as 0 to 65535


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
    return _source(place, train, test, _words(place, list(labels)), image_size)


def _words(place: Path, ids: list[str]) -> list[str]:
    """The names of the classes from words.txt, if it exists; else their ids."""
    file = place / "words.txt"
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    return [words.get(name, name).split(",")[0] for name in ids]


def load_image_folder(folder: Path, image_size: int = 0) -> Source:
    """train/<class>/* with test/<class>/* (or another of TESTS), or <class>/* alone; classes are numbered by name.

    The names of the splits may be in upper or lower case. Hidden files and folders and macOS's __MACOSX are skipped.
    """
    train = _split(folder, TRAINS)
    test = _split(folder, TESTS) if train else None
    names = _classes(train or folder)
    if not names:
        found = "found none" if folder.is_dir() else "but is not a folder"
        raise UserError(f"--data-dir {folder} must hold a folder of images for each class, {found}")
    unknown = set(_classes(test)) - set(names) if test else set()
    if unknown:
        raise UserError(f"{test} must have the classes of {train}, which has no {', '.join(sorted(unknown))}")
    if train and not test:
        _demand_no_split(train, names)
    tested = _labelled(test, names) if test else []
    return _source(folder, _labelled(train or folder, names), tested, names, image_size)


def _split(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of the names, in any case, that is a folder with classes in it."""
    found = sorted(_classes(folder), key=str.islower, reverse=True)
    named = (folder / own for name in names for own in found if own.lower() == name)
    return next((split for split in named if _classes(split)), None)


def _demand_no_split(train: Path, names: list[str]) -> None:
    """Refuses, or mentions, folders beside `train` that look like test images but cannot be used as such."""
    for other in (train.parent / name for name in _classes(train.parent) if name != train.name):
        if set(_classes(other)) & set(names):
            raise UserError(f"{other} holds classes of {train} but is not named as a split: expected one of "
                            f"{', '.join(TESTS)} for the test images, so rename it, or move it away")  # fmt: skip
        if other.name.lower() in TESTS:
            say(f"{other} has no subfolders for classes, so its images have no labels: testing on held-out images")


def _labelled(folder: Path, names: list[str]) -> list[tuple[Path, int]]:
    found = _classes(folder)
    return [(path, i) for i, name in enumerate(names) if name in found for path in _images(folder / name)]


def _shown(path: Path) -> bool:
    """Whether the file or folder is the user's, neither hidden nor one that the system keeps for itself."""
    return path.name[0] != "." and path.name != "__MACOSX"


def _classes(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and _shown(p)) if folder.is_dir() else []


def _images(folder: Path) -> list[Path]:
    shown = filter(_shown, folder.iterdir()) if folder.is_dir() else ()
    found = sorted(path for path in shown if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"{folder} must hold images ({', '.join(SUFFIXES)}), found none")
    return found


def _source(
    place: Path, train: list[tuple[Path, int]], test: list[tuple[Path, int]], names: list[str], image_size: int
) -> Source:
    files = [*train, *test]
    paths = [path for path, _ in files]
    images = _kept(place, paths, image_size) if len(files) >= CACHED_FROM else _decode(paths, image_size)
    every = Split(images, torch.tensor([label for _, label in files]))
    shown = tuple(os.fsencode(name).decode("utf-8", "replace") for name in names)  # in any locale
    return Source(every[: len(train)], every[len(train) :] if test else None, len(names), shown)


def _decode(paths: list[Path], image_size: int) -> torch.Tensor:
    with ThreadPoolExecutor() as pool, Progress("images", len(paths), "image") as progress:
        return _stack(paths, pool.map(lambda path: _read(path, image_size), paths), progress)


def _kept(place: Path, paths: list[Path], image_size: int) -> torch.Tensor:
    """The decoded images: read from a hidden cache beside them if the files have not changed, else written to it."""
    file = place / f".rter-{image_size}.safetensors"
    now = _fingerprint(place, paths)
    with contextlib.suppress(OSError, SafetensorError, KeyError, TypeError), safe_open(file, framework="pt") as kept:
        if kept.metadata()["files"] == now:
            return kept.get_tensor("images")
    images = _decode(paths, image_size)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        save_file({"images": images}, unfinished, {"files": now})
        unfinished.replace(file)
    except (OSError, SafetensorError) as error:  # no permission to write, or a full disk
        say(f"cannot cache the decoded images in {place}, so every run decodes them again: {error}")
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return images


def _fingerprint(place: Path, paths: list[Path]) -> str:
    """A hash that changes with any of the files, and with the code that decodes them."""
    import PIL

    digest = hashlib.sha256(f"1 {PIL.__version__}".encode())  # 1: the version of `to_rgb`
    for path in paths:
        found = path.stat()
        digest.update(os.fsencode(path.relative_to(place)) + f"\0{found.st_size} {found.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _stack(paths: Sequence[Path], arrays: Iterable[np.ndarray], progress: Progress) -> torch.Tensor:
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
        progress.update()
    return stacked


def _read(path: Path, image_size: int) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with path.open("rb") as file:
            try:
                Image.open(file).verify()
                file.seek(0)
                image: Image.Image = Image.open(file)
                image.load()
            except Exception as error:  # Pillow raises many kinds on damaged bytes
                stopped = f"stopped at byte {file.tell()} of {path.stat().st_size}"
                raise damaged(path, f"{stopped}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    image = to_rgb(path, image)
    if image_size:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.array(image)


def to_rgb(path: Path, image: "Image.Image") -> "Image.Image":
    """The picture in RGB, 0 to 255. 16-bit grey is divided by 257; transparency is dropped, as by torchvision.

    Raises:
        UserError: for pixels without a known range, such as 32-bit integers or floats.
    """
    from PIL import Image

    if image.mode.startswith("I") and image.format in SIXTEEN_BIT:
        image = Image.fromarray(((np.array(image, np.int64) + 128) // 257).astype(np.uint8))
    if image.mode[0] in "IF":
        raise UserError(f"{path} is refused: its pixels are of Pillow's mode {image.mode} in a {image.format} file, "
                        "whose range is not known; expected 8 bits for each colour, or a PNG of 16")  # fmt: skip
    if "transparency" in image.info:
        image = image.convert("RGBA")  # since Pillow warns when a palette with transparency goes straight to RGB
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise UserError(f"{path} is refused: its pixels are of Pillow's mode {image.mode} ({error})") from None
