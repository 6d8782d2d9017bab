"""Tile sizes of the Triton kernels by architecture."""

from typing import Any, NamedTuple

import torch


class Tile(NamedTuple):
    """What one program computes, [m, n] in steps of k, and how: warps and depth of the software pipeline."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


# {architecture: {bytes per element: tile}}; "default" fits the 99 KB of shared memory of consumer GPUs
EXPERT_CONV2D: dict[int | str, dict[int, Tile]] = {
    80: {2: Tile(128, 128, 32, 8, 4), 4: Tile(128, 64, 16, 8, 3)},
    90: {2: Tile(128, 128, 64, 8, 3), 4: Tile(128, 64, 16, 8, 3)},
    100: {2: Tile(128, 128, 64, 8, 3), 4: Tile(128, 64, 16, 8, 3)},
    "default": {2: Tile(128, 64, 32, 4, 3), 4: Tile(128, 64, 16, 8, 3)},
}
EXPERT_CONV2D_WEIGHT_GRAD: dict[int | str, dict[int, Tile]] = EXPERT_CONV2D


def choose(table: dict[int | str, Any], device: torch.device) -> Any:
    """The entry of the device's architecture, or the default."""
    if device.type != "cuda":
        return table["default"]
    major, minor = torch.cuda.get_device_capability(device)
    return table.get(10 * major + minor, table["default"])
