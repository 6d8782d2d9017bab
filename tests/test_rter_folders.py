"""Folders of image files are read exactly; damaged files and those without a known range of values are refused."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import refused
from PIL import Image
from rter.data import folders
from rter.data.load import load_data
from rter.errors import UserError


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
def test_the_test_split_may_have_any_usual_name(tmp_path: Path, names: tuple[str, str]) -> None:
    for part, count in zip(names, (3, 2), strict=True):
        for i in range(count):
            write_image(tmp_path / part / "cat" / f"{i}.png", 7)
            write_image(tmp_path / part / "dog" / f"{i}.png", 9)
    data = load_data("image-folder", 1, 0, str(tmp_path))
    assert (len(data.train), data.num_classes) == (5, 2)
    assert data.official_test is not None and data.test.y.tolist() == [0, 0, 1, 1]


def test_a_folder_that_is_ignored_or_unknown_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(2):
        write_image(tmp_path / "train" / "cat" / f"{i}.png", 7)
    write_image(tmp_path / "test" / "0.png", 7)  # without classes, as in competitions
    assert load_data("image-folder", 1, 0, str(tmp_path)).official_test is None
    assert f"{tmp_path / 'test'} has no subfolders for classes" in capsys.readouterr().err
    write_image(tmp_path / "val" / "cat" / "0.png", 7)
    assert load_data("image-folder", 1, 0, str(tmp_path)).official_test is not None
    (tmp_path / "val").rename(tmp_path / "holdout")
    message = "is not named as a split: expected one of test, testing, val, validation"
    refused("image-folder", tmp_path, f"{tmp_path / 'holdout'} holds classes of", message, held_out=1)


def test_classes_may_have_the_names_of_splits(tmp_path: Path) -> None:
    for name in ("bus", "train", "Test"):
        write_image(tmp_path / name / "a.png", 7)
    data = load_data("image-folder", 1, 0, str(tmp_path))
    assert data.num_classes == 3 and data.official_test is None


def test_hidden_files_of_macos_are_ignored(tmp_path: Path) -> None:
    """macOS adds them to folders and archives, in all these places."""
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
def test_pictures_with_every_range_of_values(name: str, tmp_path: Path) -> None:
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
    assert len(load(5)) == 5 and "cannot cache the decoded images in" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".rter-0.safetensors", ".rter-2.safetensors", "train"]


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
    refused("image-folder", tmp_path, "must have the classes of", "which has no cow", held_out=1)
