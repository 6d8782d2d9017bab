"""Random changes of a batch of images in [0, 1], drawn for each image from a given generator.

flip         mirrors left to right, with probability 1/2
translateN   shifts by up to N pixels in each direction, leaving black; cropN, a crop after padding by N, is the same
cutoutN      blackens a square of N pixels
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rter.config import Config
from rter.notation import parse_augment

Augment = Callable[[Tensor, torch.Generator], Tensor]


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors each image [n, C, H, W] with probability 1/2."""
    return torch.where(_draw(2, x, generator)[:, None, None, None] == 1, x.flip(-1), x)


def translate(x: Tensor, generator: torch.Generator, pixels: int) -> Tensor:
    """Shifts each image by up to `pixels` in each direction."""
    n, C, H, W = x.shape
    rows = _draw(2 * pixels + 1, x, generator)[:, None] + torch.arange(H, device=x.device)  # [n, H]
    columns = _draw(2 * pixels + 1, x, generator)[:, None] + torch.arange(W, device=x.device)  # [n, W]
    padded = F.pad(x, [pixels] * 4)
    tall = padded.gather(2, rows[:, None, :, None].expand(n, C, H, padded.shape[3]))
    return tall.gather(3, columns[:, None, None, :].expand(n, C, H, W))


def cutout(x: Tensor, generator: torch.Generator, pixels: int) -> Tensor:
    """Blackens a square of side `pixels` that lies wholly inside each image."""
    outside = []
    for size in x.shape[2:]:
        first = _draw(max(size - pixels, 0) + 1, x, generator)[:, None]
        at = torch.arange(size, device=x.device)
        outside.append((at < first) | (at >= first + pixels))
    return x * (outside[0][:, None, :, None] | outside[1][:, None, None, :])


def _draw(high: int, x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(high, (len(x),), generator=generator, device=generator.device).to(x.device)


CHANGES: dict[str, Callable[..., Tensor]] = {"flip": flip, "translate": translate, "crop": translate, "cutout": cutout}


def make_augment(config: Config) -> Augment:
    """A function augment(x [n, C, H, W], generator) that makes the changes of the setting `augment` one by one."""
    named = parse_augment(config.augment, config.data)
    changes = [functools.partial(CHANGES[name], **size) for name, size in named]

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        for change in changes:
            x = change(x, generator)
        return x

    return augment
