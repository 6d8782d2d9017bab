"""CUDA kernels against their reference on the CPU: every .cuh runs under emulation and g++'s sanitizers."""

from typing import Any

import pytest
import torch
from simt import emulate

from moe_kernels import reference, testing

OPERATORS = (
    "combine",
    "combine_input_grad",
    "combine_weight_grad",
    "expert_batch_norm",
    "expert_sum",
    "group_by_expert",
    "index_sum",
    "kl_divergence",
    "mask_relu",
    "mask_relu_forward",
    "topk_route",
    "topk_route_backward",
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # the dtypes supported on a GPU
CASES = [
    pytest.param(c, d, id=f"{c}-{d}".replace("torch.", ""))
    for c in testing.CASES
    if c.op in OPERATORS
    for d in (FLOATS if len(c.dtypes) > 1 else c.dtypes)
]
PGD = [
    pytest.param(c, d, id=f"{c}-{d}".replace("torch.", ""))
    for c in testing.cases("pgd_step_") + testing.cases("pgd_step_normalized_")
    for d in c.dtypes
    if d == torch.float32 or not c.name.endswith("bf16_grad")
]


def check(op: str, args: tuple[Any, ...], dtype: torch.dtype, shift: int = 0) -> None:
    """The kernel's result matches the reference; arrays begin `shift` elements past a 16-byte boundary."""
    low, exact = (getattr(reference, op)(*a) for a in (args, testing.to_double(args)))
    options = {"shift": shift} if shift else {}
    testing.assert_matches(getattr(emulate, op)(*args, **options), low, exact, dtype)


@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_operators_forward_and_backward(case: testing.Case, dtype: torch.dtype) -> None:
    for operator, args in testing.reached(case, dtype):
        check(operator.name().split("::")[1], args, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_batch_norm_of_whole_packs_far_from_zero(layout: torch.memory_format, dtype: torch.dtype) -> None:
    def make(s: testing.Source) -> tuple[Any, ...]:
        x = (s.randn(70, 24, 4, 4) + 50).contiguous(memory_format=layout)
        return x, s.randn(3, 24), s.randn(3, 24), None, None, s.offsets((33, 0, 37)), True, 0.1, 1e-3

    for operator, args in testing.reached(testing.Case("expert_batch_norm", "packs", make), dtype):
        check(operator.name().split("::")[1], args, dtype)


@pytest.mark.parametrize("case", [c for c in testing.CASES if c.name == "odd_sizes" and c.op.startswith("combine")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_unaligned_rows(case: testing.Case, dtype: torch.dtype) -> None:
    check(case.op, case.arguments(dtype), dtype, shift=1)


def test_more_experts_than_one_sorting_pass_can_distinguish() -> None:
    source = testing.Source(torch.float32)
    check("group_by_expert", (source.randint(3000, 2500), 3000), torch.float32)
    check("index_sum", (source.randn(300, 3), source.randint(1500, 300), 1500), torch.float32)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["clean", "adv"])
def test_divergence_gradient_of_one_argument_alone(needs: tuple[bool, bool]) -> None:
    source = testing.Source(torch.float32)
    grad, clean, adv = source.randn(9), source.randn(9, 70), source.randn(9, 70)
    check("kl_divergence_backward", (grad, clean, adv, *needs), torch.float32)


@pytest.mark.parametrize("num_experts", [32, 33, 128, 129, 512, 513])
def test_routing_of_ties_and_excluded_experts(num_experts: int) -> None:
    source = testing.Source(torch.bfloat16)
    logits = source.randint(4, 9, num_experts).to(torch.bfloat16)
    logits[:, 5 : num_experts // 2] = -torch.inf
    for gate, renormalize in (("softmax", False), ("softmax", True), ("sigmoid", True)):
        check("topk_route", (logits, 6, gate, renormalize), logits.dtype)
        experts = reference.topk_route(logits, 6)[1]
        check("topk_route_backward", (source.randn(9, 6).float(), logits, experts, gate, renormalize), logits.dtype)


@pytest.mark.parametrize("num_experts", [7, 100, 600])
def test_routing_of_a_row_of_nan(num_experts: int) -> None:
    logits = testing.Source(torch.float32).randn(3, num_experts)
    expected = reference.topk_route(logits, 4)[1]
    logits[1] = torch.nan
    weights, experts = emulate.topk_route(logits, 4)
    assert weights.isnan().all(1).tolist() == [False, True, False]
    assert experts.tolist() == [expected[0].tolist(), [0, 1, 2, 3], expected[2].tolist()]


def check_pgd_step(op: str, args: tuple[Any, ...], dtype: torch.dtype, shift: int = 0) -> None:
    low, exact = (getattr(reference, op)(a[0].clone(), *a[1:]) for a in (args, testing.to_double(args)))
    testing.assert_matches(getattr(emulate, op)(*args, shift=shift), low, exact, dtype)


@pytest.mark.parametrize(("case", "dtype"), PGD)
def test_pgd_step(case: testing.Case, dtype: torch.dtype) -> None:
    check_pgd_step(case.op, case.arguments(dtype), dtype)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("grad_dtype", (*testing.DTYPES, torch.float16))
def test_pgd_step_gradients_of_any_dtype_at_any_alignment(norm: str, grad_dtype: torch.dtype) -> None:
    source = testing.Source(torch.float32)
    x, grad = source.rand(2, 1030), source.randn(2, 1030, dtype=grad_dtype)
    grad[0, 5], grad[1, 7] = torch.nan, 0
    for shift in (0, 1):
        args = (x.clone(), grad, x, 0.2, 0.3, norm)
        check_pgd_step("pgd_step_", args, x.dtype, shift)
        if grad_dtype != torch.float64:
            per_channel = source.rand(1030), source.rand(1030) + 0.5
            check_pgd_step("pgd_step_normalized_", (*args, (0.0, 1.0), *per_channel), grad_dtype, shift)
