"""expert_batch_norm beyond the common contract: running statistics, accuracy, layout, saved tensors, bad input."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.ops import expert_batch_norm
from moe_kernels.testing import Source, check_threads

COUNTS = (4, 0, 1, 5)


def arguments(*size: int) -> tuple[Tensor, ...]:
    """(x, weight, bias, running_mean, running_var, offsets)"""
    s = Source(torch.float32)
    tables = [s.randn(4, 3), s.randn(4, 3), s.randn(4, 3), s.rand(4, 3) + 0.5]
    return s.randn(sum(COUNTS), 3, *size), *tables, s.offsets(COUNTS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_a_loop_of_batch_norms(training: bool, layout: torch.memory_format) -> None:
    x, weight, bias, mean, var, offsets = arguments(2, 3)
    x = x.contiguous(memory_format=layout)
    expected_mean, expected_var, parts = mean.clone(), var.clone(), []
    for e, rows in enumerate(x.split(COUNTS)):
        if len(rows):
            table = expected_mean[e], expected_var[e], weight[e], bias[e]
            parts.append(F.batch_norm(rows, *table, training, 0.2, 1e-3))
    y = expert_batch_norm(x, weight, bias, mean, var, offsets, training, 0.2, 1e-3)
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, torch.cat(parts))
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(var, expected_var)


def test_running_statistics_of_experts_with_few_values() -> None:
    x, weight, bias, mean, var, offsets = arguments()
    old_mean, old_var = mean.clone(), var.clone()
    y = expert_batch_norm(x, weight, bias, mean, var, offsets, True, 0.5)
    assert torch.equal(mean[1], old_mean[1]) and torch.equal(var[1], old_var[1])  # no rows
    torch.testing.assert_close(mean[2], (old_mean[2] + x[4]) / 2)  # one value per channel
    assert torch.equal(var[2], old_var[2])
    torch.testing.assert_close(y[4], bias[2])


@pytest.mark.parametrize("size", [(), (8, 9)])
def test_a_mean_far_from_zero_costs_no_accuracy(size: tuple[int, ...]) -> None:
    x = torch.randn(64, 3, *size) + 1000
    weight, bias, offsets = torch.ones(1, 3), torch.zeros(1, 3), torch.tensor([0, 64], dtype=torch.int32)
    mean, var = torch.zeros(1, 3), torch.zeros(1, 3)
    y = expert_batch_norm(x, weight, bias, mean, var, offsets, True, 1.0)
    over = [d for d in range(x.ndim) if d != 1]
    torch.testing.assert_close(var[0].double(), x.double().var(over), rtol=1e-6, atol=0)
    exact = F.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-4)  # half an ulp of 1000 is 3e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bitwise_equal_for_any_number_of_threads(layout: torch.memory_format) -> None:
    s = Source(torch.float32)
    x, offsets = s.randn(40, 70, 9, 8).contiguous(memory_format=layout), s.offsets((20, 1, 19))
    weight, bias, grad = s.randn(3, 70), s.randn(3, 70), s.randn(40, 70, 9, 8)

    def results() -> tuple[torch.Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = expert_batch_norm(*leaves, None, None, offsets, True)
        return y, *torch.autograd.grad(y, leaves, grad)

    check_threads(results)


@pytest.mark.parametrize(("training", "keeps_x"), [(True, True), (False, False)])
def test_saves_x_only_where_the_backward_reads_it(training: bool, keeps_x: bool) -> None:
    x, weight, bias, mean, var, offsets = arguments(2, 3)
    x.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        expert_batch_norm(x, weight, bias, mean, var, offsets, training)
    assert (x.data_ptr() in {t.data_ptr() for t in saved}) == keeps_x


def test_double_backward_in_eval_with_frozen_parameters() -> None:
    x, weight, bias, mean, var, offsets = (t.double() if t.is_floating_point() else t for t in arguments(2, 2))
    x.requires_grad_()
    y = expert_batch_norm(x, weight, bias, mean, var, offsets, False)
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    scale = (weight / (var + 1e-5).sqrt()).repeat_interleave(torch.tensor(COUNTS), 0)[..., None, None]
    torch.testing.assert_close(ddx, 6 * y.detach() * scale.square())


def test_bf16_input_with_fp32_parameters() -> None:
    x, weight, bias, mean, var, offsets = arguments(2, 3)
    weight.requires_grad_()
    y = expert_batch_norm(x.bfloat16(), weight, bias, mean, var, offsets, True)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_compiles_without_a_graph_break() -> None:
    x, weight, bias, mean, var, offsets = arguments(2, 3)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    running = mean.clone(), var.clone()
    compiled = torch.compile(expert_batch_norm, fullgraph=True)(*leaves, mean, var, offsets, True)
    eager = expert_batch_norm(*leaves, *running, offsets, True)
    torch.testing.assert_close((compiled, mean, var), (eager, *running))
    torch.testing.assert_close(
        torch.autograd.grad(compiled.pow(3).sum(), leaves), torch.autograd.grad(eager.pow(3).sum(), leaves)
    )


def test_bad_input_names_the_argument() -> None:
    x, weight, bias, mean, var, offsets = arguments()
    for match, args in {
        r"x must have at least 2 dimensions, \[N, C, \*\], got shape \[10\]": (
            x[:, 0],
            weight,
            bias,
            mean,
            var,
            offsets,
            True,
        ),
        r"x must be a floating-point tensor": (x.int(), weight, bias, mean, var, offsets, True),
        r"weight must be \[E, C\] .* here \[4, 3\], got shape \[3, 3\]": (
            x,
            weight[:3],
            bias,
            mean,
            var,
            offsets,
            True,
        ),
        r"bias must have the dtype of x, torch.float32, or be float32": (
            x,
            weight,
            bias.double(),
            mean,
            var,
            offsets,
            True,
        ),
        r"running_mean and running_var must be given together": (x, weight, bias, mean, None, offsets, True),
        r"running_mean and running_var must be given when training is False": (
            x,
            None,
            None,
            None,
            None,
            offsets,
            False,
        ),
        r"offsets must be int32": (x, weight, bias, mean, var, offsets.long(), True),
        r"offsets must be int32 of shape \[1\] \(E \+ 1\), got torch.int32 \[0\]": (
            x,
            None,
            None,
            None,
            None,
            offsets[:0],
            True,
        ),
        r"eps must be at least 0, got -1.0": (x, weight, bias, mean, var, offsets, True, 0.1, -1.0),
        r"offsets must run from 0 to the number of rows 9, got 0 to 10": (
            x[:9],
            weight,
            bias,
            mean,
            var,
            offsets,
            True,
        ),
    }.items():
        with pytest.raises(ValueError, match=match):
            expert_batch_norm(*args)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [5, 32, 37])
def test_statistics_of_many_parts_whose_means_differ(layout: torch.memory_format, side: int) -> None:
    """A part has at most 65,536 values of a channel, and by pixel 1,024."""
    images = 140 if side > 5 else 3000
    x = torch.randn(images, 3, side, side) + torch.linspace(-20, 20, images)[:, None, None, None]
    offsets = torch.tensor([0, images - 7, images], dtype=torch.int32)
    _, mean, var = torch.ops.moe_kernels.expert_batch_norm_forward(
        x.contiguous(memory_format=layout), None, None, None, None, offsets, True, 1e-5
    )
    for e, rows in enumerate(x.double().tensor_split([images - 7])):
        torch.testing.assert_close(mean[e].double(), rows.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var[e].double(), rows.var((0, 2, 3), correction=0), rtol=1e-6, atol=0)
