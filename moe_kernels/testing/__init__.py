"""Cases of every operator and the one tolerance rule, shared by tests/, benchmarks/ and checks/.

A case is a set of arguments that an operator must handle. Values, gradients, opcheck and bitwise repetition are all
checked on the same cases against moe_kernels.reference.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_kernels import ops, reference
from moe_kernels._torch import TorchDispatchMode
from moe_kernels.testing.case import DTYPES, GROUPS, Case, Source
from moe_kernels.testing.cases import CASES, cases
from moe_kernels.testing.in_order import InOrder

__all__ = [
    "CASES",
    "DTYPES",
    "GROUPS",
    "Case",
    "InOrder",
    "Source",
    "as_tuple",
    "assert_equals",
    "assert_matches",
    "cases",
    "check_gradcheck",
    "check_gradients",
    "check_opcheck",
    "check_repeats",
    "check_threads",
    "check_values",
    "gradients",
    "operator",
    "reached",
    "to_double",
]


def operator(case: Case) -> Callable[..., Any]:
    """The public function of the case's operator."""
    return getattr(ops, case.op)


def as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def to_double(args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments with floating-point tensors copied to fp64."""
    return tuple(a.to(torch.float64, copy=True) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def assert_matches(out: Any, low: Any, exact: Any, dtype: torch.dtype) -> None:
    """The tolerance rule: max|out - exact| <= 2 max|low - exact| + 2 eps(dtype) max|exact|; integers must be equal.

    `exact` is the reference in fp64 and `low` the reference in `dtype`, computed under InOrder so that the bound is the
    same on every CPU. Each is a tensor or a tuple of tensors.
    """
    for o, a, e in zip(as_tuple(out), as_tuple(low), as_tuple(exact), strict=True):
        assert o.shape == e.shape, f"shape {list(o.shape)}, expected {list(e.shape)}"
        if not e.is_floating_point():
            assert torch.equal(o.cpu(), e.cpu().to(o.dtype)), "integers differ"
            continue
        if e.numel() == 0:
            continue
        o, a, e = o.double().cpu(), a.double().cpu(), e.double().cpu()
        assert not o.isnan().any(), "NaN in the result: memory that was not written, or read in the wrong place"
        error, slack = (o - e).abs().max(), (a - e).abs().max()
        bound = 2 * slack + 2 * torch.finfo(dtype).eps * e.abs().max()
        assert error <= bound, f"error {error:.3e} beyond the bound {bound:.3e} (reference's own error {slack:.3e})"


def assert_equals(out: Any, function: Callable[..., Any], args: Sequence[Any], dtype: torch.dtype) -> None:
    """Asserts that `out` equals function(*args), by the tolerance rule; function is plain torch, args in `dtype`."""
    exact = function(*to_double(args))
    with InOrder():
        assert_matches(out, function(*args), exact, dtype)


def _leaves(args: Sequence[Any], needed: Sequence[int]) -> tuple[Any, ...]:
    """The arguments as autograd leaves; those at the positions `needed` require a gradient."""
    return tuple(
        a.detach().requires_grad_(i in needed) if isinstance(a, Tensor) and a.is_floating_point() else a
        for i, a in enumerate(args)
    )


def gradients(
    function: Callable[..., Any], args: Sequence[Any], needed: Sequence[int], grads: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of sum(outputs * grads), over the floating-point outputs that have one, for the arguments `needed`."""
    leaves = _leaves(args, needed)
    outputs = [y for y in as_tuple(function(*leaves)) if y.is_floating_point()]
    pairs = [(y, g.to(y)) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
    if not pairs:
        return ()
    wanted = [leaves[i] for i in needed]
    return torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs])


def check_values(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Asserts that the operator equals its reference, by the tolerance rule."""
    function = getattr(reference, case.op)
    out = operator(case)(*case.arguments(dtype, device))
    assert_equals(out, function, case.arguments(dtype, device), dtype)


def differentiable(args: Sequence[Any], buffers: Sequence[int] = ()) -> tuple[int, ...]:
    """Positions of the arguments that have a gradient: floating-point tensors other than buffers."""
    return tuple(i for i, a in enumerate(args) if i not in buffers and isinstance(a, Tensor) and a.is_floating_point())


def check_gradients(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Asserts that all gradients together, and each alone with the other arguments frozen, equal the reference's."""
    args = case.arguments(dtype, device)
    function = getattr(reference, case.op)
    source = Source(torch.float64, device, seed=1)
    grads = [source.randn(*y.shape).to(dtype) for y in as_tuple(function(*args)) if y.is_floating_point()]
    every = differentiable(args, case.buffers)
    for needed in {every, *((i,) for i in every)}:
        out = gradients(operator(case), args, needed, grads)
        with InOrder():
            low = gradients(function, args, needed, grads)
        exact = gradients(function, to_double(args), needed, to_double(grads))
        assert_matches(out, low, exact, dtype)


def check_repeats(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Asserts that two calls with the same arguments give bitwise equal results."""
    first_run, second_run = (as_tuple(operator(case)(*case.arguments(dtype, device))) for _ in range(2))
    for first, second in zip(first_run, second_run, strict=True):
        assert torch.equal(first, second)


def check_threads(function: Callable[[], Sequence[Tensor]]) -> None:
    """Asserts that one, two and four threads give bitwise equal results."""
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, several in zip(results[0], other, strict=True):
            assert torch.equal(one, several)


def check_gradcheck(case: Case) -> None:
    """Asserts that first and second derivatives in fp64 equal finite differences."""
    args = case.arguments(torch.float64)
    every = differentiable(args, case.buffers)

    def function(*leaves: Tensor) -> Any:
        full = list(args)
        for i, leaf in zip(every, leaves, strict=True):
            full[i] = leaf
        outputs = as_tuple(operator(case)(*full))
        return tuple(y for y in outputs if y.requires_grad) or sum(leaf.sum() * 0 for leaf in leaves)

    leaves = [args[i].detach().requires_grad_() for i in every]
    if not leaves:
        return
    if case.gradcheck:
        assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


class _Recorder(TorchDispatchMode):
    """Collects the calls of this package's operators, including those made in a backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "moe_kernels":
            self.calls.setdefault(str(func), (func, args))
        return func(*args, **(kwargs or {}))


def reached(case: Case, dtype: torch.dtype, device: str = "cpu") -> list[tuple[Any, tuple[Any, ...]]]:
    """This package's operators that the case calls, forward and backward, each with the arguments of its first call."""
    args = case.arguments(dtype, device)
    every = differentiable(args, case.buffers)
    source = Source(torch.float64, seed=1)
    with _Recorder() as recorder:
        outputs = as_tuple(operator(case)(*args))
        grads = [source.randn(*y.shape).to(y) for y in outputs if y.is_floating_point()]
        if case.has_gradient and any(y.requires_grad for y in as_tuple(operator(case)(*_leaves(args, every)))):
            gradients(operator(case), args, every, grads)
    assert recorder.calls
    return list(recorder.calls.values())


OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor")


def check_opcheck(case: Case, compiled: bool, device: str = "cpu") -> None:
    """Runs torch.library.opcheck on every operator that the case reaches, forward and backward. The slow check, under
    torch.compile with dynamic shapes, runs only if `compiled`."""
    checks = (*OPCHECK, "test_aot_dispatch_dynamic") if compiled else OPCHECK
    for func, call_args in reached(case, torch.float32, device):
        wanted = differentiable(call_args) if case.has_gradient else ()
        torch.library.opcheck(func, _leaves(call_args, wanted), test_utils=checks)
