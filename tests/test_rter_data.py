"""Data sets: small files in the true formats are read as they are, and damaged ones are refused by file and byte."""

import io
import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rter.__main__ import main
from rter.data import Split, cifar10, folders, load_data
from rter.data.plain_pickle import read_pickle
from rter.errors import UserError
from scipy.io import savemat

RNG = np.random.default_rng(0)


def test_split_keeps_bytes_and_gives_floats() -> None:
    pixels = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    split = Split(pixels, torch.arange(5))
    assert split[1:3].pixels.dtype == torch.uint8 and len(split[1:3]) == 2
    torch.testing.assert_close(split[torch.tensor([4, 0])].x, pixels[[4, 0]].float() / 255, rtol=0, atol=0)
    floats = torch.rand(5, 3, 4, 4)
    assert Split(floats, split.y).x is floats
    assert torch.equal(Split(pixels % 17, split.y, levels=16).x * 16, (pixels % 17).float())


def test_a_sample_has_the_proportions_of_the_classes() -> None:
    """Of a set sorted by class, as folders are read, and of one with a class of a single image and one of none."""
    y = torch.tensor([0] * 100 + [1] * 60 + [2] * 40 + [4])
    split = Split(torch.arange(201.0)[:, None, None, None], y)
    sample = split.sample(20, seed=3)
    assert sample.y.bincount().tolist() == [10, 6, 4] and sample.x.flatten().diff().gt(0).all()
    assert torch.equal(y[sample.x.flatten().long()], sample.y)
    assert not torch.equal(sample.x, split.sample(20, seed=4).x) and torch.equal(sample.x, split.sample(20, seed=3).x)
    for count in (1, 21, 50, 200, 201, 500):
        larger = split.sample(count, seed=3)
        assert len(larger) == min(count, 201)
        assert all((larger.y == c).sum() - size * len(larger) / 201 < 1 for c, size in enumerate(y.bincount().tolist()))
        fewer, more = sorted((sample, larger), key=len)
        assert set(fewer.x.flatten().tolist()) <= set(more.x.flatten().tolist())


def refused(name: str, folder: Path, *parts: str, held_out: int = 2) -> str:
    with pytest.raises(UserError) as error:
        load_data(name, held_out, 0, str(folder))
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message
    return message


# CIFAR-10


def batch(n: int) -> Split:
    return Split(torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (n,)))


def python2_pickle(value: Any) -> bytes:
    """What Python 2's cPickle wrote in protocol 2, as in the published batches, which differs from Python 3's."""

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
    """Five batches of 4 images and one of 3 to test."""
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
        whole[:-1]: "data_batch_3.bin is damaged: 12291 bytes, the record at byte 9219 has 3072 of 3073",
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
        python_batch(images)[:-1]: "no whole pickle, after byte",
        python_batch(images)[:5000]: "no whole pickle, after byte",
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
    content = {"X": RNG.integers(256, size=(32, 32, 3, 5), dtype=np.uint8), "y": np.array([[10], [1], [2], [9], [5]])}
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


# images in files of their own


def write_image(path: Path, value: int, size: tuple[int, int] = (4, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 2 * value, 3 * value)).save(
        path, **({"quality": 95} if path.suffix != ".png" else {})
    )


def write_tiny_imagenet(folder: Path) -> Path:
    place = folder / "tiny-imagenet-200"
    for i, name in enumerate(("n02", "n01", "n03")):
        for j in range(2):
            write_image(place / "train" / name / "images" / f"{name}_{j}.JPEG", 10 * i, (64, 64))
    (place / "wnids.txt").write_text("n02\nn01\nn03\n")
    write_image(place / "val" / "images" / "val_0.JPEG", 20, (64, 64))
    write_image(place / "val" / "images" / "val_1.JPEG", 0, (64, 64))
    (place / "val" / "val_annotations.txt").write_text("val_1.JPEG\tn02\t0\t0\t9\t9\nval_0.JPEG\tn03\t0\t0\t9\t9\n")
    return place


def test_tiny_imagenet(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path)
    data = load_data("tiny-imagenet", 2, 0, str(tmp_path), image_size=16)
    assert data.train.pixels.shape == (4, 3, 16, 16) and data.num_classes == 3
    assert data.test.y.tolist() == [0, 2]
    every = torch.cat([data.train.y, data.held_out.y, data.test.y])
    red = torch.cat([data.train.pixels, data.held_out.pixels, data.test.pixels])[:, 0].float().mean((1, 2))
    torch.testing.assert_close(red, 10.0 * every, rtol=0, atol=2)


def test_tiny_imagenet_refuses(tmp_path: Path) -> None:
    refused("tiny-imagenet", tmp_path, "wnids.txt does not exist", "rter data fetch tiny-imagenet")
    place = write_tiny_imagenet(tmp_path)
    image = place / "train" / "n01" / "images" / "n01_1.JPEG"
    whole = image.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\xff" * 50):
        image.write_bytes(content)
        refused("tiny-imagenet", tmp_path, "n01_1.JPEG is damaged: stopped at byte", f"of {len(content)}")
    image.write_bytes(whole)
    (place / "val" / "val_annotations.txt").write_text("val_1.JPEG\tn77\n")
    refused(
        "tiny-imagenet", tmp_path, "val_annotations.txt is damaged: line 1 must be an image and a class of wnids.txt"
    )
    (place / "val" / "val_annotations.txt").write_text("../val_1.JPEG\tn01\n")
    refused("tiny-imagenet", tmp_path, "line 1 must be an image")
    (place / "wnids.txt").write_text("n02\nn05\n")
    refused("tiny-imagenet", tmp_path, "n05", "must hold images")


def test_image_folder(tmp_path: Path) -> None:
    for part, name, value in (("train", "cat", 7), ("train", "dog", 9), ("val", "dog", 9)):
        for i in range(2):
            write_image(tmp_path / part / name / f"{i}.png", value)
    data = load_data("image-folder", 1, 0, str(tmp_path))
    assert len(data.train) == 3 and data.num_classes == 2 and data.test.y.tolist() == [1, 1]
    assert data.test.pixels[0, :, 0, 0].tolist() == [9, 18, 27]
    without_test = load_data("image-folder", 1, 0, str(tmp_path / "train"))
    assert without_test.official_test is None and without_test.test is without_test.held_out


@pytest.mark.parametrize("names", [("train", name) for name in ("test", "testing", "val", "validation", "valid", "dev",
    "eval", "Validation", "TEST")] + [("Train", "Val"), ("training", "testing")])  # fmt: skip
def test_a_split_by_any_usual_name_is_the_test(tmp_path: Path, names: tuple[str, str]) -> None:
    for part, count in zip(names, (3, 2), strict=True):
        for i in range(count):
            write_image(tmp_path / part / "cat" / f"{i}.png", 7)
            write_image(tmp_path / part / "dog" / f"{i}.png", 9)
    data = load_data("image-folder", 1, 0, str(tmp_path))
    assert (len(data.train), data.num_classes) == (5, 2)
    assert data.official_test is not None and data.test.y.tolist() == [0, 0, 1, 1]


def test_no_split_is_passed_over_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(2):
        write_image(tmp_path / "train" / "cat" / f"{i}.png", 7)
    write_image(tmp_path / "test" / "0.png", 7)  # without classes, as in competitions
    assert load_data("image-folder", 1, 0, str(tmp_path)).official_test is None
    assert f"{tmp_path / 'test'} holds no folders of classes" in capsys.readouterr().err
    write_image(tmp_path / "val" / "cat" / "0.png", 7)
    assert load_data("image-folder", 1, 0, str(tmp_path)).official_test is not None
    (tmp_path / "val").rename(tmp_path / "holdout")
    message = "is no split by its name: expected one of test, testing, val, validation"
    refused("image-folder", tmp_path, f"{tmp_path / 'holdout'} holds classes of", message, held_out=1)


def test_classes_may_have_the_names_of_splits(tmp_path: Path) -> None:
    for name in ("bus", "train", "Test"):
        write_image(tmp_path / name / "a.png", 7)
    data = load_data("image-folder", 1, 0, str(tmp_path))
    assert data.num_classes == 3 and data.official_test is None


def test_what_no_viewer_shows_is_passed_over(tmp_path: Path) -> None:
    """The files that macOS adds to folders and archives, in every place where it puts them."""
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            for i in range(2):
                write_image(tmp_path / part / name / f"{i}.png", 7)
                (tmp_path / part / name / f"._{i}.png").write_bytes(b"\0\5\x16\7")
            (tmp_path / part / name / ".DS_Store").write_bytes(b"\0")
        for hidden in (".thumbnails", "__MACOSX"):
            for folder in (tmp_path / part / hidden, tmp_path / hidden / part / "cat"):
                folder.mkdir(parents=True)
                (folder / "._0.png").write_bytes(b"\0\5\x16\7")
    data = load_data("image-folder", 1, 0, str(tmp_path))
    assert len(data.train) == 3 and len(data.test) == 4 and data.num_classes == 2
    place = write_tiny_imagenet(tmp_path)
    (place / "train" / "n01" / "images" / "._n01_0.JPEG").write_bytes(b"\0\5\x16\7")
    assert len(load_data("tiny-imagenet", 1, 0, str(tmp_path)).train) == 5


def sixteen_bit_png(colour: int, values: list[int]) -> bytes:
    """One pixel; colour 0 is grey, 2 RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + np.array(values, ">u2").tobytes()))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def saved(mode: str, value: Any, kind: str = "PNG", **options: Any) -> bytes:
    file, image = io.BytesIO(), Image.new(mode, (1, 1), value)
    if mode == "P":
        image.putpalette([0, 0, 0, 156, 20, 30])
    image.save(file, kind, **options)
    return file.getvalue()


GREY = (156, 156, 156)  # of 40000 in 65535, to rounding
PICTURES = {
    "16-bit grey": (sixteen_bit_png(0, [40000]), GREY),
    "16-bit RGB": (sixteen_bit_png(2, [40000, 65535, 0]), (156, 255, 0)),
    "16-bit grey and alpha": (sixteen_bit_png(4, [40000, 65535]), GREY),
    "16-bit RGBA": (sixteen_bit_png(6, [40000, 65535, 0, 9]), (156, 255, 0)),
    "16-bit PGM": (b"P5 1 1 65535\n" + (40000).to_bytes(2, "big"), GREY),
    "10-bit PGM": (b"P5 1 1 1023\n" + (624).to_bytes(2, "big"), GREY),
    "10-bit PPM": (b"P6 1 1 1023\n" + np.array([624, 1023, 0], ">u2").tobytes(), (156, 255, 0)),
    "4-bit PGM": (b"P5 1 1 15\n" + bytes([5]), (85, 85, 85)),
    "1": (saved("1", 1), (255, 255, 255)),
    "1-bit PBM": (b"P4 1 1\n" + bytes([0]), (255, 255, 255)),
    "L": (saved("L", 156), GREY),
    "L with transparency": (saved("L", 156, transparency=156), GREY),
    "LA": (saved("LA", (156, 9)), GREY),
    "RGBA": (saved("RGBA", (156, 20, 30, 9)), (156, 20, 30)),
    "palette": (saved("P", 1), (156, 20, 30)),
    "palette with transparency": (saved("P", 1, transparency=bytes([128, 0])), (156, 20, 30)),
    "GIF with transparency": (saved("P", 1, "GIF", transparency=1), (156, 20, 30)),
    "CMYK": (saved("CMYK", (99, 235, 225, 0), "TIFF"), (156, 20, 30)),
    "YCbCr": (saved("YCbCr", (255, 128, 128), "TIFF"), (255, 255, 255)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_every_range(name: str, tmp_path: Path) -> None:
    content, expected = PICTURES[name]
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "a.png").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = load_data("image-folder", 1, 0, str(tmp_path)).train.pixels
    assert pixels.dtype == torch.uint8 and tuple(pixels.flatten().tolist()) == expected


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "La", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr",
                                  "HSV", "LAB", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"])  # fmt: skip
def test_every_mode_becomes_rgb_or_is_refused_by_name(mode: str) -> None:
    image = Image.new(mode, (2, 2))
    try:
        assert folders.to_rgb(Path("a.png"), image).mode == "RGB"
    except UserError as error:
        assert f"a.png is refused: its pixels are of Pillow's mode {mode} " in str(error)
    else:
        assert mode[0] not in "IF"


@pytest.mark.parametrize(
    ("content", "mode"),
    [(saved("I", 40000, "TIFF"), "I"), (saved("F", 0.6, "TIFF"), "F"), (saved("I;16", 40000, "TIFF"), "I;16"),
     (saved("I;16B", 40000, "TIFF"), "I;16B"), (b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 0.6), "F")],
)  # fmt: skip
def test_a_picture_without_a_known_range_is_refused(content: bytes, mode: str, tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "cat" / name).write_bytes(content)
    refused("image-folder", tmp_path, f"a.png is refused: its pixels are of Pillow's mode {mode} in a ", held_out=1)


def test_decoded_images_are_kept_beside_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folders, "CACHED_FROM", 4)
    read, decoded = folders._read, []

    def watched(path: Path, size: int) -> np.ndarray:
        decoded.append(path)
        return read(path, size)

    monkeypatch.setattr(folders, "_read", watched)
    for name, value in (("cat", 7), ("dog", 9)):
        for i in range(2):
            write_image(tmp_path / "train" / name / f"{i}.png", value)
    kept = tmp_path / ".rter-0.safetensors"

    def load(decodes: int, size: int = 0) -> torch.Tensor:
        decoded.clear()
        data = load_data("image-folder", 1, 0, str(tmp_path), size)
        assert len(decoded) == decodes
        return torch.cat([data.train.pixels, data.held_out.pixels])

    first = load(4)
    assert torch.equal(load(0), first) and load(4, size=2).shape[2:] == (2, 2) and torch.equal(load(0), first)
    write_image(tmp_path / "train" / "dog" / "1.png", 20)  # another picture of the same name
    assert torch.equal(load(4).unique(), torch.tensor([7, 9, 14, 18, 20, 21, 27, 40, 60], dtype=torch.uint8))
    load(0)
    write_image(tmp_path / "train" / "dog" / "2.png", 20)
    assert len(load(5)) == 5
    whole = kept.read_bytes()
    for damage in (b"", whole[:-5], b"x" * 50):
        kept.write_bytes(damage)
        assert len(load(5)) == 5 and kept.read_bytes() == whole
    kept.unlink()
    kept.mkdir()  # nothing can be written there
    capsys.readouterr()
    assert len(load(5)) == 5 and "cannot be kept in" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".rter-0.safetensors", ".rter-2.safetensors", "train"]


def test_some_of_the_training_images(tmp_path: Path) -> None:
    every, some = load_data("digits", 360, 0), load_data("digits", 360, 0, train_images=200)
    assert torch.equal(some.held_out.pixels, every.held_out.pixels) and len(some.train) == 200
    assert (some.train.y.bincount() - every.train.y.bincount() * 200 / 1437).abs().max() < 1
    rows = {tuple(row.tolist()) for row in every.train.pixels.flatten(1)}
    assert all(tuple(row.tolist()) in rows for row in some.train.pixels.flatten(1))
    assert not torch.equal(some.train.y, load_data("digits", 360, 1, train_images=200).train.y)
    with pytest.raises(UserError, match="train_images must be at most 1437 beside those held out, got 1438"):
        load_data("digits", 360, 0, train_images=1438)


def test_image_folder_refuses(tmp_path: Path) -> None:
    refused("image-folder", tmp_path, "must hold a folder of images for each class")
    for name in ("cat", "dog"):
        write_image(tmp_path / "train" / name / "a.png", 1)
    path = tmp_path / "train" / "dog" / "a.png"
    whole = path.read_bytes()
    for content in (whole[:-20], whole[:40] + b"\x99" + whole[41:], b"text"):
        path.write_bytes(content)
        refused("image-folder", tmp_path, f"{path} is damaged: stopped at byte", held_out=1)
    write_image(path, 1, (4, 3))
    refused("image-folder", tmp_path, "a.png is 4x3 where", "is 4x4: give --image-size", held_out=1)
    assert load_data("image-folder", 1, 0, str(tmp_path), image_size=2).train.pixels.shape[2:] == (2, 2)
    write_image(path, 1)
    write_image(tmp_path / "val" / "cow" / "a.png", 1)
    refused("image-folder", tmp_path, "must have the classes of", "which holds no cow", held_out=1)


def test_a_missing_data_set_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", "--data", "cifar10", "--data-dir", str(tmp_path), "--out", str(run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not run.exists()
