"""Tile sizes of the Triton kernels, by GPU architecture."""

from typing import Any, NamedTuple

import torch


class Tile(NamedTuple):
    """What one program computes, [m, n] in steps of k, with how many warps and stages of the software pipeline.

    `tma` loads blocks through TMA descriptors in a persistent grid, where the operands' layouts allow it.
    """

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    tma: bool = False


# {architecture: {bytes per element: {size: tile}}}; "default" fits the 99 KB of shared memory of consumer GPUs
Table = dict[int | str, dict[int, dict[str, Tile]]]

MANY_ROWS = 128  # the "many" tile is used from this mean number of rows per expert on

EXPERT_LINEAR: Table = {
    80: {
        2: {"many": Tile(128, 128, 64, 8, 4), "few": Tile(32, 128, 64, 4, 4)},
        4: {"many": Tile(64, 64, 16, 8, 3), "few": Tile(32, 64, 32, 4, 3)},
    },
    90: {
        2: {"many": Tile(128, 256, 64, 8, 3, tma=True), "few": Tile(64, 128, 64, 4, 4, tma=True)},
        4: {"many": Tile(64, 64, 32, 8, 3), "few": Tile(32, 64, 16, 4, 3)},
    },
    100: {
        2: {"many": Tile(128, 256, 64, 8, 3, tma=True), "few": Tile(64, 128, 64, 4, 4, tma=True)},
        4: {"many": Tile(64, 64, 32, 8, 3), "few": Tile(32, 64, 32, 4, 3)},
    },
    "default": {
        2: {"many": Tile(128, 128, 32, 8, 3), "few": Tile(32, 128, 32, 4, 4)},
        4: {"many": Tile(64, 64, 32, 8, 3), "few": Tile(32, 64, 32, 4, 3)},
    },
}
# A program holds two accumulators of [m, n].
EXPERT_LINEAR_GATED: Table = {
    80: {
        2: {"many": Tile(128, 64, 64, 8, 3), "few": Tile(32, 64, 64, 4, 4)},
        4: {"many": Tile(32, 64, 32, 8, 3), "few": Tile(32, 32, 32, 4, 3)},
    },
    90: {
        2: {"many": Tile(128, 128, 64, 8, 3, tma=True), "few": Tile(64, 64, 64, 4, 4, tma=True)},
        4: {"many": Tile(32, 64, 32, 8, 3), "few": Tile(32, 32, 32, 4, 3)},
    },
    100: {
        2: {"many": Tile(128, 64, 64, 8, 3, tma=True), "few": Tile(64, 64, 64, 4, 3, tma=True)},
        4: {"many": Tile(32, 64, 16, 8, 3), "few": Tile(32, 32, 32, 4, 3)},
    },
    "default": {
        2: {"many": Tile(128, 64, 32, 8, 3), "few": Tile(32, 64, 32, 4, 4)},
        4: {"many": Tile(32, 64, 32, 8, 3), "few": Tile(32, 32, 32, 4, 3)},
    },
}
# [m, n] is a tile of one expert's [out, in]; k counts rows.
EXPERT_LINEAR_WEIGHT_GRAD: Table = {
    80: {
        2: {"many": Tile(128, 128, 32, 8, 4), "few": Tile(128, 128, 32, 8, 4)},
        4: {"many": Tile(64, 64, 16, 8, 3), "few": Tile(64, 64, 16, 8, 3)},
    },
    90: {
        2: {"many": Tile(128, 256, 64, 8, 3, tma=True), "few": Tile(128, 128, 32, 8, 4, tma=True)},
        4: {"many": Tile(64, 64, 32, 8, 3), "few": Tile(64, 64, 32, 8, 3)},
    },
    100: {
        2: {"many": Tile(128, 256, 64, 8, 3, tma=True), "few": Tile(128, 128, 32, 8, 4, tma=True)},
        4: {"many": Tile(64, 64, 32, 8, 3), "few": Tile(64, 64, 32, 8, 3)},
    },
    "default": {
        2: {"many": Tile(128, 128, 32, 8, 3), "few": Tile(128, 128, 32, 8, 3)},
        4: {"many": Tile(64, 64, 32, 8, 3), "few": Tile(64, 64, 32, 8, 3)},
    },
}
# No size classes: even a few images give a convolution many rows.
EXPERT_CONV2D: dict[int | str, dict[int, Tile]] = {
    80: {2: Tile(128, 128, 32, 8, 4), 4: Tile(128, 64, 16, 8, 3)},
    90: {2: Tile(128, 128, 64, 8, 3), 4: Tile(128, 64, 16, 8, 3)},
    100: {2: Tile(128, 128, 64, 8, 3), 4: Tile(128, 64, 16, 8, 3)},
    "default": {2: Tile(128, 64, 32, 4, 3), 4: Tile(128, 64, 16, 8, 3)},
}
# [m, n] is a tile of one expert's [O, C] under one tap; k counts positions.
EXPERT_CONV2D_WEIGHT_GRAD: dict[int | str, dict[int, Tile]] = EXPERT_CONV2D


def choose(table: dict[int | str, Any], device: torch.device) -> Any:
    """The table's entry for the device's architecture, or the default."""
    if device.type != "cuda":
        return table["default"]
    major, minor = torch.cuda.get_device_capability(device)
    return table.get(10 * major + minor, table["default"])


def size(num_rows: int, num_experts: int) -> str:
    """The size class of a sorted batch, by the mean number of rows per expert: the host does not know more."""
    return "many" if num_rows >= MANY_ROWS * num_experts else "few"
