"""Augmentations are drawn for each image, depend only on the generator, and equal a loop over images."""

import pytest
import torch
from rter.data.augment import cutout, flip, make_augment, translate
from rter.errors import UserError
from rter.settings import make_config
from torch import Tensor
from torch.nn import functional as F

X = torch.rand(200, 3, 7, 6)


def by(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_flip_mirrors_about_half_of_the_images() -> None:
    y = flip(X, by(0))
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(y, X, strict=True)]
    assert 70 < sum(flipped) < 130
    assert all(f or torch.equal(a, b) for f, a, b in zip(flipped, y, X, strict=True))


def test_translate_takes_every_window_of_the_padded_image() -> None:
    y, padded = translate(X, by(0), pixels=2), F.pad(X, [2] * 4)
    seen = set()
    for image, source in zip(y, padded, strict=True):
        windows = [(i, j) for i in range(5) for j in range(5) if torch.equal(image, source[:, i : i + 7, j : j + 6])]
        assert len(windows) == 1
        seen.add(windows[0])
    assert len(seen) == 25


@pytest.mark.parametrize("pixels", [1, 3, 6])
def test_cutout_blackens_one_square(pixels: int) -> None:
    y = cutout(X, by(0), pixels=pixels)
    corners = set()
    for image, source in zip(y, X, strict=True):
        black = (image == 0).all(0).nonzero()
        first, last = black.min(0).values, black.max(0).values
        assert (last - first + 1).tolist() == [pixels, pixels] and len(black) == pixels**2
        kept = (image != 0).all(0)
        assert torch.equal(image[:, kept], source[:, kept])
        corners.add(tuple(first.tolist()))
    assert len(corners) == (8 - pixels) * (7 - pixels)


def test_depends_only_on_the_generator() -> None:
    augment, before = make_augment(make_config(augment="flip,crop4,cutout3")), torch.random.get_rng_state()
    images = X.clone()
    first, again, other = augment(X, by(1)), augment(X, by(1)), augment(X, by(2))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(X, images)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.shape == X.shape and first.min() >= 0 and first.max() <= 1
    expected: Tensor = X
    generator = by(1)
    for change in (flip, lambda x, g: translate(x, g, 4), lambda x, g: cutout(x, g, 3)):
        expected = change(expected, generator)
    assert torch.equal(first, expected)


def test_auto_is_the_papers_augmentation_except_for_digits() -> None:
    paper = make_augment(make_config(data="cifar10", augment="flip,translate2,cutout8"))
    assert torch.equal(make_augment(make_config(data="cifar10", augment="auto"))(X, by(0)), paper(X, by(0)))
    for config in (make_config(), make_config(data="cifar10", augment="none")):
        assert make_augment(config)(X, by(0)) is X
    unflipped = make_augment(make_config(augment="translate2,cutout8"))
    assert torch.equal(make_augment(make_config(data="svhn"))(X, by(0)), unflipped(X, by(0)))


@pytest.mark.parametrize("text", ["turn", "translate", "cutout0", "flip2", "flip,", "flip translate2", ""])
def test_bad_names_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="augment must be auto, none, or flip, translateN, cropN and cutoutN"):
        make_config(augment=text)
