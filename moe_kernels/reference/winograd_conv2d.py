"""Winograd's F(4 x 4, 3 x 3), for the tiles X of every image: Y = A^T [sum over channels (G w G^T) * (B^T X B)] A,
and dw = G^T [sum over tiles (A dY A^T) * (B^T X B)] G."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

POINTS = [(2 / 3, 3 / 2), (-2 / 3, 3 / 2), (3 / 2, 2 / 3), (-3 / 2, 2 / 3)]  # (p, q): p is a point, +-q the other two
NORMS = [2 * p**2 * (p**2 - q**2) for p, q in POINTS]
G = [[1, 0, 0], *([1 / n, p / n, p**2 / n] for (p, _), n in zip(POINTS, NORMS, strict=True)), [0, 0, 1]]
B_T = [[1, 0, -97 / 36, 0, 1, 0], *([0, -p * q**2, -(q**2), p, 1, 0] for p, q in POINTS), [0, 1, 0, -97 / 36, 0, 1]]
A_T = [[float(i == 0), *(p**i for p, _ in POINTS), float(i == 3)] for i in range(4)]


def winograd_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, padding: list[int], transposed: bool = False
) -> Tensor:
    _, g, a = _matrices(x)
    weight = weight.flip(3, 4).transpose(1, 2) if transposed else weight
    height, width = (size + 2 * p - 2 for size, p in zip(x.shape[2:], padding, strict=True))
    kernels = g @ weight @ g.mT  # [E, O, C, 6, 6]
    parts = zip(pairwise(offsets.tolist()), kernels, strict=True)
    points = _input_points(x, padding)
    products = torch.cat([torch.einsum("nchwij,ocij->nohwij", points[i:j], k) for (i, j), k in parts])
    y = (a @ products @ a.mT).transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :height, :width]
    return y if bias is None else y + bias.repeat_interleave(offsets.diff(), 0)[:, :, None, None]


def winograd_conv2d_weight_grad(grad: Tensor, x: Tensor, offsets: Tensor, padding: list[int]) -> Tensor:
    _, g, a = _matrices(x)
    grad = F.pad(grad, (0, -grad.shape[3] % 4, 0, -grad.shape[2] % 4))
    grads = a.mT @ grad.unfold(2, 4, 4).unfold(3, 4, 4) @ a  # [N, O, rows, columns, 6, 6]
    points, parts = _input_points(x, padding), pairwise(offsets.tolist())
    return g.mT @ torch.stack([torch.einsum("nohwij,nchwij->ocij", grads[i:j], points[i:j]) for i, j in parts]) @ g


def _matrices(x: Tensor) -> list[Tensor]:
    return [torch.tensor(m, dtype=x.dtype, device=x.device) for m in (B_T, G, A_T)]


def _input_points(x: Tensor, padding: list[int]) -> Tensor:
    """B^T X B of every tile: [N, C, rows, columns, 6, 6]."""
    b, _, _ = _matrices(x)
    right, bottom = (padding[i] + -(x.shape[2 + i] + 2 * padding[i] - 2) % 4 for i in (1, 0))
    x = F.pad(x, (padding[1], right, padding[0], bottom))
    return b @ x.unfold(2, 6, 4).unfold(3, 6, 4) @ b.mT
