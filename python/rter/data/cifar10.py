"""CIFAR-10, 3x32x32, in its binary or its Python batches.

A binary batch is a sequence of records: one byte of label, then 3072 of pixels, by channel, row and column.

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from rter.data import digits
from rter.data.files import check_labels, damaged, find_folder, missing, read_bytes
from rter.data.plain_pickle import read_pickle
from rter.data.split import Source, Split

RECORD = 1 + 3 * 32 * 32
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BINARY, PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"


def load(folder: Path, image_size: int = 0) -> Source:
    """The five training batches and the test batch; the binary version if both are there."""
    for name, suffix, read in ((BINARY, ".bin", _read_binary), (PYTHON, "", _read_python)):
        place = find_folder(folder, name, f"data_batch_1{suffix}")
        if place:
            return _load(place, suffix, read)
    raise missing("cifar10", folder, f"{BINARY}/data_batch_1.bin")


def _load(place: Path, suffix: str, read: Callable[[Path], Split]) -> Source:
    paths = [place / f"data_batch_{i}{suffix}" for i in range(1, 6)]
    batches = [read(path) for path in paths]
    for path, batch in zip(paths, batches, strict=True):
        if len(batch) != len(batches[0]):
            raise damaged(path, f"{len(batch)} images, expected {len(batches[0])} as in {paths[0].name}")
    train = Split(torch.cat([b.pixels for b in batches]), torch.cat([b.y for b in batches]))
    return Source(train, read(place / f"test_batch{suffix}"), 10, NAMES)


def _read_binary(path: Path) -> Split:
    content = read_bytes(path)
    count, rest = divmod(len(content), RECORD)
    if rest or not count:
        raise damaged(path, f"{len(content)} bytes; the record at byte {count * RECORD} has {rest} of {RECORD}")
    records = np.frombuffer(content, np.uint8).reshape(count, RECORD)
    check_labels(path, records[:, 0], 0, 9, "byte", RECORD)
    return _split(records[:, 1:], records[:, 0])


def _read_python(path: Path) -> Split:
    batch = read_pickle(path)
    images = getattr(batch.get(b"data"), "array", None) if isinstance(batch, dict) else None
    labels = batch.get(b"labels") if isinstance(batch, dict) else None
    if images is None or images.ndim != 2 or images.shape[1] != RECORD - 1 or not isinstance(labels, list):
        raise damaged(path, f"expected a dict of data [n, {RECORD - 1}] and labels [n]")
    if len(labels) != len(images) or not all(type(label) is int for label in labels):
        raise damaged(path, f"expected {len(images)} whole numbers as labels, one per image, got {len(labels)} values")
    check_labels(path, np.array(labels), 0, 9, "image")
    return _split(images, np.array(labels))


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    pixels = torch.from_numpy(images.reshape(-1, 3, 32, 32).copy())
    return Split(pixels, torch.from_numpy(labels.astype(np.int64)))


def write_binary(path: Path, images: Split) -> None:
    """Writes 3x32x32 uint8 images as one binary batch."""
    records = torch.cat([images.y[:, None].to(torch.uint8), images.pixels.flatten(1)], 1)
    path.write_bytes(records.numpy().tobytes())


def make_digits(folder: Path) -> Path:
    """Writes the digits, enlarged to 3x32x32, as the files of CIFAR-10: 5 x 287 for training, 362 for testing."""
    place = folder / BINARY
    place.mkdir(parents=True, exist_ok=True)
    small = digits.load().train
    large = torch.nn.functional.interpolate(small.x, (32, 32), mode="bilinear").clamp(0, 1)
    images = Split((large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1), small.y)
    for i in range(5):
        write_binary(place / f"data_batch_{i + 1}.bin", images[287 * i : 287 * (i + 1)])
    write_binary(place / "test_batch.bin", images[5 * 287 :])
    return place
