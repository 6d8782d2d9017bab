"""kl_divergence: against closed forms, under underflow, one gradient alone, messages."""

import math
from typing import Any

import pytest
import torch

from moe_kernels import reference, testing
from moe_kernels.ops import kl_divergence


def test_closed_forms() -> None:
    clean = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64).log()
    adv = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.25, 0.75]], dtype=torch.float64).log()
    expected = [0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.0, math.log(4)]
    torch.testing.assert_close(kl_divergence(clean + 3, adv - 2), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("case", testing.cases("kl_divergence"), ids=str)
def test_double_precision(case: testing.Case) -> None:
    args = case.arguments(torch.float64)
    grad = torch.randn(args[0].shape[0], dtype=torch.float64)
    for ours, expected in zip(
        (kl_divergence(*args), *testing.gradients(kl_divergence, args, (0, 1), (grad,))),
        (reference.kl_divergence(*args), *testing.gradients(reference.kl_divergence, args, (0, 1), (grad,))),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_keep_value_and_gradients_finite(dtype: torch.dtype) -> None:
    clean = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    adv = torch.tensor([[-1e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
    out = kl_divergence(clean, adv)
    assert out.item() == 2 * float(clean[0, 0])
    out.sum().backward()
    assert adv.grad is not None and adv.grad.tolist() == [[-1.0, 1.0, 0.0]]
    assert clean.grad is not None and clean.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_a_class_ruled_out_by_minus_infinity() -> None:
    clean = torch.tensor([[0.0, -torch.inf, 0.0]], requires_grad=True)
    adv = torch.zeros(1, 3, requires_grad=True)
    kl_divergence(clean, adv).sum().backward()
    torch.testing.assert_close(clean.grad, torch.zeros(1, 3))
    torch.testing.assert_close(adv.grad, torch.tensor([[-1 / 6, 1 / 3, -1 / 6]]))


def test_backward_writes_only_what_is_needed() -> None:
    grad, clean, adv = torch.ones(2), torch.randn(2, 3), torch.randn(2, 3)
    dclean, dadv = torch.ops.moe_kernels.kl_divergence_backward(grad, clean, adv, False, True)
    assert dclean.numel() == 0 and dadv.shape == (2, 3)


def test_16_bit_logits_give_float32() -> None:
    assert kl_divergence(torch.randn(2, 3).bfloat16(), torch.randn(2, 3).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean_logits": torch.zeros(3)}, "clean_logits must have 2 dimensions"),
        ({"adv_logits": torch.zeros(2, 4)}, r"adv_logits must be .*\[2, 3\], got shape \[2, 4\]"),
        ({"adv_logits": torch.zeros(2, 3, dtype=torch.float64)}, "adv_logits must have the dtype"),
        ({"adv_logits": torch.zeros(2, 3, device="meta")}, "adv_logits must be on the device"),
        ({"clean_logits": torch.zeros(2, 0), "adv_logits": torch.zeros(2, 0)}, "at least one class"),
    ],
)
def test_mistakes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kl_divergence(**({"clean_logits": torch.zeros(2, 3), "adv_logits": torch.zeros(2, 3)} | change))


def test_autocast_leaves_the_dtype_alone() -> None:
    clean, adv = 9 * torch.randn(4, 5), 9 * torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(kl_divergence(clean, adv), kl_divergence(clean, adv, backend="reference"))
        assert kl_divergence(clean.bfloat16(), adv).dtype == torch.float32
        assert kl_divergence(clean.double(), adv.double()).dtype == torch.float64
        with pytest.raises(ValueError, match=r"adv_logits must have the dtype of clean_logits, torch.float64"):
            kl_divergence(clean.double(), adv)
