"""Data sets: small files in the real formats are read exactly; damaged ones are refused, naming file and byte."""

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from rter.__main__ import main
from rter.data import cifar10
from rter.data.load import load_data
from rter.data.plain_pickle import read_pickle
from rter.data.split import Split
from rter.errors import UserError
from scipy.io import savemat


def test_split_keeps_bytes_and_gives_floats() -> None:
    pixels = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    split = Split(pixels, torch.arange(5))
    assert split[1:3].pixels.dtype == torch.uint8 and len(split[1:3]) == 2
    torch.testing.assert_close(split[torch.tensor([4, 0])].x, pixels[[4, 0]].float() / 255, rtol=0, atol=0)
    floats = torch.rand(5, 3, 4, 4)
    assert Split(floats, split.y).x is floats
    assert torch.equal(Split(pixels % 17, split.y, levels=16).x * 16, (pixels % 17).float())


def test_a_sample_has_the_proportions_of_the_classes() -> None:
    """For a set sorted by class, as folders are read, and one with a class of a single image and a class of none."""
    y = torch.tensor([0] * 100 + [1] * 60 + [2] * 40 + [4])
    split = Split(torch.arange(201.0)[:, None, None, None], y)
    sample = split.sample(20, seed=3)
    assert sample.y.bincount().tolist() == [10, 6, 4] and sample.x.flatten().diff().gt(0).all()
    assert torch.equal(y[sample.x.flatten().long()], sample.y)
    assert not torch.equal(sample.x, split.sample(20, seed=4).x) and torch.equal(sample.x, split.sample(20, seed=3).x)
    with pytest.raises(UserError, match="images must be at most 201, all that there are to measure on, got 202"):
        split.sample(202, seed=3)
    for count in (1, 21, 50, 200, 201):
        larger = split.sample(count, seed=3)
        assert len(larger) == count
        assert all((larger.y == c).sum() - size * len(larger) / 201 < 1 for c, size in enumerate(y.bincount().tolist()))
        fewer, more = sorted((sample, larger), key=len)
        assert set(fewer.x.flatten().tolist()) <= set(more.x.flatten().tolist())


# CIFAR-10


def batch(n: int) -> Split:
    return Split(torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (n,)))


def python2_pickle(value: Any) -> bytes:
    """Python 2's cPickle in protocol 2, as in the published batches, which differs from Python 3's."""

    def dump(value: Any) -> bytes:
        if isinstance(value, bytes):
            return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(dump, value)) + b"e"
        if isinstance(value, dict):
            return b"}(" + b"".join(dump(key) + dump(value[key]) for key in value) + b"u"
        shape = b"(" + b"".join(dump(size) for size in value.shape) + b"t"
        dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        return made + b"(K\x01" + shape + dtype + b"\x89" + dump(value.tobytes()) + b"tb"

    return b"\x80\x02" + dump(value) + b"."


def python_batch(images: Split, **changes: Any) -> bytes:
    content = {
        b"batch_label": b"training batch 1 of 5",
        b"labels": images.y.tolist(),
        b"data": images.pixels.flatten(1).numpy(),
        b"filenames": [b"a.png"] * len(images),
    }
    return python2_pickle(content | {name.encode(): value for name, value in changes.items()})


def write_cifar(folder: Path, version: str) -> list[Split]:
    """Five batches of 4 images, and a test batch of 3."""
    batches = [batch(4) for _ in range(5)] + [batch(3)]
    place = folder / f"cifar-10-batches-{version}"
    place.mkdir()
    for name, images in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], batches, strict=True):
        if version == "bin":
            cifar10.write_binary(place / f"{name}.bin", images)
        else:
            (place / name).write_bytes(python_batch(images))
    return batches


@pytest.mark.parametrize("version", ["bin", "py"])
def test_cifar10(tmp_path: Path, version: str) -> None:
    batches = write_cifar(tmp_path, version)
    source = cifar10.load(tmp_path)
    assert torch.equal(source.train.pixels, torch.cat([b.pixels for b in batches[:5]])) and source.test is not None
    assert torch.equal(source.train.y, torch.cat([b.y for b in batches[:5]]))
    assert torch.equal(source.test.pixels, batches[5].pixels) and torch.equal(source.test.y, batches[5].y)
    data = load_data("cifar10", 6, 0, str(tmp_path / f"cifar-10-batches-{version}"))
    assert (len(data.train), len(data.held_out), len(data.test), data.num_classes) == (14, 6, 3, 10)
    assert torch.equal(data.test.x, batches[5].pixels.float() / 255)


def test_cifar10_binary_refuses(tmp_path: Path) -> None:
    refused("cifar10", tmp_path, "data_batch_1.bin does not exist", "rter data fetch cifar10")
    write_cifar(tmp_path, "bin")
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    whole = path.read_bytes()
    for content, message in {
        whole[:-1]: "data_batch_3.bin is damaged: 12291 bytes; the record at byte 9219 has 3072 of 3073",
        whole[:-3073]: "data_batch_3.bin is damaged: 3 images, expected 4 as in data_batch_1.bin",
        b"": "data_batch_3.bin is damaged: 0 bytes",
        whole[:3073] + b"\x4d" + whole[3074:]: "data_batch_3.bin is damaged: label 77 at byte 3073, expected 0 to 9",
    }.items():
        path.write_bytes(content)
        refused("cifar10", tmp_path, message)
    path.unlink()
    refused("cifar10", tmp_path, "cannot read", "data_batch_3.bin: No such file")


def test_cifar10_python_refuses(tmp_path: Path) -> None:
    write_cifar(tmp_path, "py")
    path, images = tmp_path / "cifar-10-batches-py" / "data_batch_2", batch(4)
    for content, message in {
        python_batch(images)[:-1]: "not a complete pickle, after byte",
        python_batch(images)[:5000]: "not a complete pickle, after byte",
        python_batch(images, labels=[1, 2, 3]): "expected 4 whole numbers as labels, one per image, got 3",
        python_batch(images, labels=[1, 2, 3, b"4"]): "expected 4 whole numbers as labels",
        python_batch(images, labels=[1, 2, 10, 3]): "label 10 at image 2, expected 0 to 9",
        python_batch(images, data=np.zeros((4, 5), np.uint8)): "expected a dict of data [n, 3072] and labels [n]",
        python2_pickle([1]): "expected a dict of data",
    }.items():
        path.write_bytes(content)
        refused("cifar10", tmp_path, "data_batch_2 is damaged", message)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_not_run(tmp_path: Path, protocol: int) -> None:
    path, marker = tmp_path / "batch", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"data": Malicious(marker)}, protocol))
    with pytest.raises(UserError, match=r"batch is damaged: .* at byte \d+ has no place in a data file, not loaded"):
        read_pickle(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02cnumpy\nload\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02K\x01r\xff\xff\xff\xff.",
        b"\x80\x02U\x01aK\x01R.",
        b"\x80\x02](K\x01K\x02tb.",
        b"\x80\x02cnumpy\nndarray\n)R(K\x01K\x02tb.",
        b"",
    ],
)
def test_odd_pickles_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "batch").write_bytes(content)
    with pytest.raises(UserError, match="batch is damaged"):
        read_pickle(tmp_path / "batch")


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 250), value=st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, position: int, value: int) -> None:
    content = bytearray(python2_pickle({b"labels": [1, 2], b"data": np.zeros((2, 3), np.uint8), b"names": [b"x"] * 4}))
    content[position % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "changed"
    path.write_bytes(content)
    try:
        read_pickle(path)
    except UserError as error:
        assert str(error).startswith(f"{path} is damaged")


def test_digits_in_cifar10s_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "make-cifar-digits", "--data-dir", str(tmp_path)]) == 0
    assert "rter train --data cifar10" in capsys.readouterr().out
    data = load_data("cifar10", 35, 0, str(tmp_path))
    assert data.train.pixels.shape == (1400, 3, 32, 32) and len(data.test) == 362
    assert data.train.x.max() == 1 and data.train.y.bincount().min() > 100


# SVHN


def write_svhn(folder: Path, name: str, **changes: np.ndarray) -> dict[str, np.ndarray]:
    content = {
        "X": np.random.default_rng(0).integers(256, size=(32, 32, 3, 5), dtype=np.uint8),
        "y": np.array([[10], [1], [2], [9], [5]]),
    }
    content |= changes
    savemat(folder / f"{name}_32x32.mat", content, do_compression=True)
    return content


def test_svhn(tmp_path: Path) -> None:
    train, test = write_svhn(tmp_path, "train"), write_svhn(tmp_path, "test")
    data = load_data("svhn", 1, 0, str(tmp_path))
    assert len(data.train) == 4 and torch.equal(data.test.y, torch.tensor([0, 1, 2, 9, 5]))
    assert np.array_equal(data.test.pixels[3, 2].numpy(), test["X"][:, :, 2, 3])
    assert int(data.train.pixels.sum()) + int(data.held_out.pixels.sum()) == train["X"].sum()


def test_svhn_refuses(tmp_path: Path) -> None:
    refused("svhn", tmp_path, "train_32x32.mat does not exist", "rter data fetch svhn")
    write_svhn(tmp_path, "train")
    refused("svhn", tmp_path, "cannot read", "test_32x32.mat")
    write_svhn(tmp_path, "test")
    path = tmp_path / "train_32x32.mat"
    whole = path.read_bytes()
    for content, message in {
        whole[:-7]: f"ends at {len(whole)}, the file at {len(whole) - 7}",
        whole[:132]: "the element at byte 128 ends at 136, the file at 132",
        whole[:100]: "no MATLAB 5 header",
        whole[:2000] + bytes(50) + whole[2050:]: "train_32x32.mat is damaged",
    }.items():
        path.write_bytes(content)
        refused("svhn", tmp_path, "train_32x32.mat is damaged", message)
    write_svhn(tmp_path, "train", y=np.array([[10], [1], [11], [9], [5]]))
    refused("svhn", tmp_path, "label 11 at image 2, expected 1 to 10")
    write_svhn(tmp_path, "train", y=np.array([[10], [1]]))
    refused("svhn", tmp_path, "expected X [32, 32, 3, n] uint8 and y [n, 1], got uint8 (32, 32, 3, 5) and (2, 1)")


def test_training_on_a_part_of_the_images(tmp_path: Path) -> None:
    every, some = load_data("digits", 360, 0), load_data("digits", 360, 0, train_images=200)
    assert torch.equal(some.held_out.pixels, every.held_out.pixels) and len(some.train) == 200
    assert (some.train.y.bincount() - every.train.y.bincount() * 200 / 1437).abs().max() < 1
    rows = {tuple(row.tolist()) for row in every.train.pixels.flatten(1)}
    assert all(tuple(row.tolist()) in rows for row in some.train.pixels.flatten(1))
    assert not torch.equal(some.train.y, load_data("digits", 360, 1, train_images=200).train.y)
    with pytest.raises(UserError, match="train_images must be 0 to 1437 besides those held out, got 1438"):
        load_data("digits", 360, 0, train_images=1438)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("digit", 360, 0), r"name must be one of digits, .*, got 'digit': did you mean digits\?"),
        (("digits", 0, 0), "held_out must be between 1 and 1796 for digits, got 0"),
        (("digits", 360, 0, "data", 0, -1), "train_images must be 0 to 1437 besides those held out, got -1"),
    ],
)
def test_arguments_that_no_data_set_has(arguments: tuple[Any, ...], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_data(*arguments)


def test_a_missing_data_set_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", "--data", "cifar10", "--data-dir", str(tmp_path), "--out", str(run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not run.exists()
