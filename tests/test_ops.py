"""The contract of every operator, on every case of moe_kernels.testing."""

import pytest
import torch

from moe_kernels import testing

EVERY = [pytest.param(c, d, id=f"{c}-{d}".replace("torch.", "")) for c in testing.CASES for d in c.dtypes]
EVERY_GRADIENT = [p for p in EVERY if p.values[0].has_gradient]
FIRST = list({c.op: c for c in reversed(testing.CASES) if "no_rows" not in c.name}.values())  # one case of each op
SMALL = [c for c in testing.CASES if c.name != "odd_sizes" and not c.name.endswith("odd_sizes")]


@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_values(case: testing.Case, dtype: torch.dtype) -> None:
    testing.check_values(case, dtype)


@pytest.mark.parametrize(("case", "dtype"), EVERY_GRADIENT)
def test_gradients(case: testing.Case, dtype: torch.dtype) -> None:
    testing.check_gradients(case, dtype)


@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_repeats(case: testing.Case, dtype: torch.dtype) -> None:
    testing.check_repeats(case, dtype)


@pytest.mark.parametrize("case", [c for c in SMALL if c.has_gradient and torch.float64 in c.dtypes], ids=str)
def test_gradcheck(case: testing.Case) -> None:
    testing.check_gradcheck(case)


@pytest.mark.parametrize("case", testing.CASES, ids=str)
def test_opcheck(case: testing.Case) -> None:
    testing.check_opcheck(case, compiled=case in FIRST)
