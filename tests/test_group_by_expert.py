"""group_by_expert beyond the common contract: what order, position and offsets promise; threads; errors."""

import pytest
import torch

from moe_kernels.ops import Groups, group_by_expert
from moe_kernels.testing import check_threads


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sorts_stably(dtype: torch.dtype) -> None:
    order, position, offsets = group_by_expert(torch.tensor([[2, 0], [0, 3], [2, 0]], dtype=dtype), 5)
    assert order.tolist() == [1, 2, 5, 0, 4, 3]
    assert position.tolist() == [[3, 0], [1, 5], [4, 2]]
    assert offsets.tolist() == [0, 3, 3, 5, 6, 6]
    assert {order.dtype, position.dtype, offsets.dtype} == {torch.int32}


@pytest.mark.parametrize("compiled", [False, True])
def test_the_result_has_names(compiled: bool) -> None:
    function = torch.compile(group_by_expert, fullgraph=True, backend="eager") if compiled else group_by_expert
    groups = function(torch.tensor([[2, 0], [0, 3]]), 5)
    assert isinstance(groups, Groups) and groups._fields == ("order", "position", "offsets")
    assert [t.tolist() for t in groups] == [[1, 2, 0, 3], [[2, 0], [1, 3]], [0, 2, 2, 3, 4, 4]]


@pytest.mark.parametrize("num_experts", [1, 3, 256, 5000])
def test_many_blocks(num_experts: int) -> None:
    experts = torch.randint(num_experts, (10007, 2), dtype=torch.int32)
    order, position, offsets = group_by_expert(experts, num_experts)
    slots = torch.arange(experts.numel(), dtype=torch.int32)
    assert torch.equal(order[position.flatten().long()], slots)
    assert torch.equal(order, experts.flatten().argsort(stable=True).int())
    assert torch.equal(offsets.diff(), experts.flatten().bincount(minlength=num_experts).int())


def test_bitwise_equal_for_any_number_of_threads() -> None:
    experts = torch.randint(16, (20011, 2), dtype=torch.int32)
    check_threads(lambda: group_by_expert(experts, 16))


@pytest.mark.parametrize(
    ("experts", "num_experts", "message"),
    [
        (torch.zeros(3, 2), 4, r"experts must be an int32 or int64 tensor \[T, k\] or \[T\], got torch.float32"),
        (torch.zeros(3, 2, 1).int(), 4, r"experts must be .*, got torch.int32 \[3, 2, 1\]"),
        (torch.zeros(3, 2).int(), 0, "num_experts must be at least 1, got 0"),
        (torch.tensor([0, 4, 1]), 4, r"experts must lie in \[0, 4\), got 4"),
        (torch.tensor([0, -1, 1]).int(), 4, r"experts must lie in \[0, 4\), got -1"),
        (torch.tensor([0, 2**32]), 4, r"experts must lie in \[0, 4\), got 4294967296"),
    ],
)
def test_errors_name_the_argument(experts: torch.Tensor, num_experts: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_by_expert(experts, num_experts)
