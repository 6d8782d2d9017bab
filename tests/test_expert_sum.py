"""expert_sum and index_sum beyond the common contract: closed forms, threads, bad input."""

import pytest
import torch

from moe_kernels.ops import expert_sum, index_sum
from moe_kernels.testing import check_threads


def test_sums_by_expert_and_by_index() -> None:
    x = torch.arange(8.0).reshape(4, 2)
    assert expert_sum(x, torch.tensor([0, 1, 1, 4]).int()).tolist() == [[0, 1], [0, 0], [12, 15]]
    assert index_sum(x, torch.tensor([2, 0, 2, 2]).int(), 3).tolist() == [[2, 3], [0, 0], [10, 13]]


def test_bitwise_equal_for_any_number_of_threads() -> None:
    x, index = torch.randn(999, 700), torch.randint(50, (999,), dtype=torch.int32)
    offsets = torch.tensor([0, 400, 401, 999]).int()
    check_threads(lambda: (expert_sum(x, offsets), index_sum(x, index, 50)))


def test_bad_input_names_the_argument() -> None:
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="offsets must run from 0 to the number of rows 4, got 0 to 3"):
        expert_sum(x, torch.tensor([0, 3]).int())
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 3\), got -1"):
        index_sum(x, torch.tensor([0, 1, -1, 2]).int(), 3)
