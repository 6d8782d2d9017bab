"""The fused PGD update beside the usual seven kernels and beside a plain copy of its bytes."""

import pytest
import torch
from conftest import Contest
from peers import pgd_step
from torch import Tensor

from moe_kernels import pgd_step_
from moe_kernels.testing import Source

EPS, ALPHA = 8 / 255, 2 / 255


@pytest.mark.parametrize("name", ["moe_kernels", "7 eager kernels", "copy of the same bytes"])
def test_linf(contest: Contest, name: str) -> None:
    s = Source(torch.float32)
    x, grad = s.rand(256, 3, 32, 32), s.randn(256, 3, 32, 32)
    x_adv = (x + EPS * (2 * s.rand(256, 3, 32, 32) - 1)).clamp(0, 1)
    work = x_adv.clone()
    two = torch.empty(2, *x.shape), torch.empty(2, *x.shape)

    def ours() -> Tensor:
        return pgd_step_(work, grad, x, EPS, ALPHA)

    exact = pgd_step(x_adv.double(), grad.double(), x.double(), EPS, ALPHA)
    contest(
        "pgd_step_ Linf 256 x 3 x 32 x 32",
        {
            "moe_kernels": ours,
            "7 eager kernels": lambda: pgd_step(x_adv, grad, x, EPS, ALPHA),
            "copy of the same bytes": lambda: two[0].copy_(two[1]),
        },
        name,
        exact=None if name.startswith("copy") else lambda: exact,
        target=[("7 eager kernels", 4), ("copy of the same bytes", 0.9)],
    )
