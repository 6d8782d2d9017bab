"""A convolution that mixes a kernel for each image, beside the two ways in which it is written by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import MAX_GRADIENT_ERROR, Contest, first_is_core
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import ExpertCondConv2d
from moe_kernels.testing import Source

NARROW = [(128, 16, 32), (128, 32, 16), (128, 64, 8), (128, 128, 4)]  # images, channels, pixels per side
CASES = [*NARROW, (32, 64, 32), (32, 128, 16), (32, 256, 8), (32, 512, 4), (2, 64, 32), (2, 256, 8)]


def one_group_for_each_image(layer: ExpertCondConv2d, x: Tensor, offsets: Tensor) -> Tensor:
    """As published, and in timm: the batch is one contiguous image with a group of channels for each image."""
    kernels = layer.coefficients(x, offsets) @ layer.weight.flatten(2)[0]
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels.view(-1, *layer.weight.shape[3:]), padding=1, groups=len(x))
    return y.view(len(x), -1, *y.shape[2:])


def sum_of_convolutions(layer: ExpertCondConv2d, x: Tensor, offsets: Tensor) -> Tensor:
    results = [F.conv2d(x, weight, padding=1) for weight in layer.weight[0]]
    return torch.einsum("nkohw,nk->nohw", torch.stack(results, 1), layer.coefficients(x, offsets))


CONTENDERS: dict[str, Callable[[ExpertCondConv2d, Tensor, Tensor], Tensor]] = {
    "moe_kernels": lambda layer, x, offsets: layer(x, offsets),
    "a group for each image": one_group_for_each_image,
    "a sum of convolutions": sum_of_convolutions,
}


@pytest.mark.parametrize("case", first_is_core(CASES), ids=str)
@pytest.mark.parametrize("name", CONTENDERS)
def test_layer(contest: Contest, case: tuple[int, int, int], name: str) -> None:
    """Forward and backward with the gradients of images and parameters; four kernels, fp32, each in its best layout."""
    torch.manual_seed(0)
    images, channels, side = case
    layer, offsets = ExpertCondConv2d(1, 4, channels, channels, 3, 1, 1), torch.tensor([0, images], dtype=torch.int32)
    nn.init.normal_(layer.router.weight)
    x = Source(torch.float32).randn(images, channels, side, side)
    layouts = {c: torch.contiguous_format if "group" in c else torch.channels_last for c in CONTENDERS}
    images_of = {c: x.contiguous(memory_format=layout).requires_grad_() for c, layout in layouts.items()}

    def run(contender: str) -> tuple[Tensor, ...]:
        y = CONTENDERS[contender](layer, images_of[contender], offsets)
        return torch.autograd.grad(y, [images_of[contender], *layer.parameters()], y.detach())

    ours, theirs = run("moe_kernels"), run(name)
    for found, expected in zip(ours, theirs, strict=True):
        assert (found - expected).norm() <= MAX_GRADIENT_ERROR[torch.float32] * expected.norm()
    contenders: dict[str, Callable[[], Any]] = {c: lambda c=c: run(c) for c in CONTENDERS}
    label = f"four kernels mixed for each image, {images} images, {channels} channels, {side} x {side}"
    contest(label, contenders, name, targets={c: ">= 1" for c in list(CONTENDERS)[1:]})
