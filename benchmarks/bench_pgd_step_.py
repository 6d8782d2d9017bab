"""The fused PGD update against the usual seven kernels and against a plain copy of the same number of bytes."""

import pytest
import torch
from conftest import Contest, first_is_core
from peers import pgd_step
from torch import Tensor

from moe_kernels import pgd_step_
from moe_kernels.testing import Source

EPS, ALPHA = 8 / 255, 2 / 255


SHAPES = [(256, 3, 32, 32), (64, 3, 224, 224)]  # fits the cache, exceeds it


@pytest.mark.parametrize("shape", first_is_core(SHAPES), ids=str)
@pytest.mark.parametrize("name", ["moe_kernels", "7 eager kernels", "copy of the same bytes"])
def test_linf(contest: Contest, shape: tuple[int, ...], name: str) -> None:
    s = Source(torch.float32)
    x, grad = s.rand(*shape), s.randn(*shape)
    x_adv = (x + EPS * (2 * s.rand(*shape) - 1)).clamp(0, 1)
    work = x_adv.clone()
    two = torch.zeros(2, *shape), torch.zeros(2, *shape)  # 8 bytes read and 8 written per element, as 12 and 4 here

    def ours() -> Tensor:
        return pgd_step_(work, grad, x, EPS, ALPHA)

    exact = pgd_step(x_adv.double(), grad.double(), x.double(), EPS, ALPHA)
    contest(
        f"pgd_step_ Linf {' x '.join(map(str, shape))}",
        {
            "moe_kernels": ours,
            "7 eager kernels": lambda: pgd_step(x_adv, grad, x, EPS, ALPHA),
            "copy of the same bytes": lambda: two[0].copy_(two[1]),
        },
        name,
        exact=None if name.startswith("copy") else lambda: exact,
        targets={"7 eager kernels": ">= 4", "copy of the same bytes": ">= 0.9"},
    )
