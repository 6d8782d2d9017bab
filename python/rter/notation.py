"""Parsers of the settings `augment` and `normalize`, which have a notation of their own."""

import math
import re

from rter.errors import UserError

# what `auto` means; PAPER is the RT-ER paper's augmentation on CIFAR-10
AUTO = {"digits": "none", "svhn": "translate2,cutout8"}
PAPER = "flip,translate2,cutout8"


def parse_augment(text: str, data: str) -> list[tuple[str, dict[str, int]]]:
    """The changes that the setting augment names, such as "flip,translate2,cutout8", each with its size in pixels.

    Raises:
        UserError: for an unknown name or a size that is missing.
    """
    changes: list[tuple[str, dict[str, int]]] = []
    named = AUTO.get(data, PAPER) if text == "auto" else text
    for name in named.split(",") if named != "none" else ():
        match = re.fullmatch(r"(translate|crop|cutout)([1-9][0-9]*)", name)
        if match:
            changes.append((match[1], {"pixels": int(match[2])}))
        elif name == "flip":
            changes.append((name, {}))
        else:
            known = "auto, none, or flip, translateN, cropN and cutoutN with commas between"
            raise UserError(f"augment must be {known}, got {text!r}")
    return changes


def parse_normalize(text: str) -> list[list[float]]:
    """Mean and deviation of each channel, as in 0.49,0.48,0.45/0.25,0.24,0.26."""
    try:
        mean, std = ([float(number) for number in part.split(",")] for part in text.split("/"))
    except ValueError:
        raise UserError(
            f"normalize must be data, or means/deviations as 0.49,0.48,0.45/0.25,0.24,0.26, got {text!r}"
        ) from None
    if not all(map(math.isfinite, mean)) or not all(math.isfinite(value) and value > 0 for value in std):
        raise UserError(f"normalize must have finite means and deviations above 0, got {text!r}")
    return [mean, std]
