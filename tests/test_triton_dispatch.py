"""The Triton kernels are registered as the CUDA implementation of their operators, and take the same arguments."""

import inspect

import pytest
import torch

from moe_kernels import _library, reference, testing

OPS = (
    "expert_linear",
    "expert_linear_weight_grad",
    "expert_mlp_hidden_grad",
    "expert_conv2d",
    "expert_conv2d_input_grad",
    "expert_conv2d_weight_grad",
)


def test_kernels_are_registered_for_cuda() -> None:
    assert set(OPS) == set(_library.TRITON)
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_kernels::{op}", "CUDA")


@pytest.mark.parametrize("op", OPS)
def test_takes_the_arguments_of_the_operator(op: str) -> None:
    schema = [argument.name for argument in getattr(torch.ops.moe_kernels, op).default._schema.arguments]
    kernel = inspect.signature(_library.triton_kernel(_library.TRITON[op], op)).parameters.values()
    positional = [p.name for p in kernel if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional[: len(schema)] == schema
    assert all(p.default is not p.empty for p in list(kernel)[len(schema) :])


@pytest.mark.parametrize("op", ["expert_linear", "expert_conv2d"])
def test_computes_the_operator(op: str) -> None:
    case = next(c for c in testing.cases(op) if c.name == "an_expert_gets_none")
    args = case.arguments(torch.float32)
    if op == "expert_conv2d":
        args = (*args[:4], [1, 1], [1, 1])  # stride, padding
    out = _library.run_triton(_library.TRITON[op], op, *args)
    testing.assert_equals(out, getattr(reference, op), args, torch.float32)


def test_refuses_float64() -> None:
    with pytest.raises(
        ValueError, match=r"expert_linear takes float32, bfloat16 or float16 on a GPU, got torch\.float64"
    ):
        _library.run_triton("expert_linear", "expert_linear", torch.zeros(1, 1, dtype=torch.float64))
