"""Cases of every operator and the one tolerance rule, shared by tests/ and benchmarks/.

A case is a set of arguments that an operator must handle. Values, gradients, opcheck and bitwise repetition are all
checked on the same cases against moe_kernels.reference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels import ops, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16)

# Rows of each expert in a sorted batch.
GROUPS: dict[str, tuple[int, ...]] = {
    "no_rows": (0, 0, 0),
    "one_row": (0, 1, 0),
    "one_expert_takes_all": (0, 9, 0),
    "an_expert_gets_none": (4, 0, 5),
    "single_expert": (7,),
    "odd_sizes": (63, 100, 129),
}


class Source:
    """Seeded random arguments of one dtype on one device; inputs are of order 1."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Drawn in fp64, so that every dtype sees the same numbers up to its own rounding."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x.to(dtype or self.dtype).to(self.device)

    def rand(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return x.to(dtype or self.dtype).to(self.device)

    def randint(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, dtype=torch.int32).to(self.device)

    def offsets(self, counts: Sequence[int]) -> Tensor:
        return torch.tensor([0, *counts]).cumsum(0).int().to(self.device)

    def strided(self, x: Tensor) -> Tensor:
        """The same values, laid out with gaps."""
        gaps = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        gaps[..., ::2] = x
        return gaps[..., ::2]


@dataclass(frozen=True)
class Case:
    """Arguments for one operator. `make` draws them from a source of a given dtype."""

    op: str
    name: str
    make: Callable[[Source], tuple[Any, ...]]
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def arguments(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
        return self.make(Source(dtype, device, seed))


def _expert_linear_cases() -> list[Case]:
    def make(s: Source, counts: tuple[int, ...], k: int, n: int, bias: bool, gather: bool, strided: bool) -> tuple:
        rows, experts = sum(counts), len(counts)
        tokens = max(rows // 2, 1)
        x = s.randn(tokens if gather else rows, k)
        return (
            s.strided(x) if strided else x,
            s.randn(experts, n, k).div(k**0.5),
            s.randn(experts, n) if bias else None,
            s.offsets(counts),
            s.randint(tokens, rows) if gather else None,
        )

    def case(name: str, counts: tuple[int, ...], k: int, n: int, **options: bool) -> Case:
        settings = {"bias": True, "gather": False, "strided": False} | options
        return Case("expert_linear", name, lambda s: make(s, counts, k, n, **settings))

    cases = [case(name, counts, 63 if name == "odd_sizes" else 5, 4) for name, counts in GROUPS.items()]
    cases += [case(f"gather_{name}", counts, 6, 129 if name == "odd_sizes" else 3, gather=True)
              for name, counts in GROUPS.items()]  # fmt: skip
    cases += [
        case("no_bias", (4, 0, 5), 7, 3, bias=False),
        case("strided", (4, 0, 5), 7, 3, strided=True),
        case("strided_gather", (4, 0, 5), 7, 3, strided=True, gather=True),
    ]
    return cases


def _expert_sum_cases() -> list[Case]:
    def case(name: str, counts: tuple[int, ...], width: int) -> list[Case]:
        rows = sum(counts)
        return [
            Case("expert_sum", name, lambda s: (s.randn(rows, width), s.offsets(counts))),
            Case("index_sum", name, lambda s: (s.randn(rows, width), s.randint(5, rows), 5)),
        ]

    return [c for name, counts in GROUPS.items() for c in case(name, counts, 300 if name == "odd_sizes" else 5)]


def _expert_conv2d_cases() -> list[Case]:
    def case(
        name: str,
        counts: tuple[int, ...],
        c: int = 2,
        o: int = 2,
        *,
        size: tuple[int, int] = (3, 2),
        kernel: tuple[int, int] = (3, 3),
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 1,
        bias: bool = True,
        layout: Callable[[Source, Tensor], Tensor] = lambda s, x: x,
    ) -> Case:
        def make(s: Source) -> tuple[Any, ...]:
            x = layout(s, s.randn(sum(counts), c, *size))
            weight = s.randn(len(counts), o, c, *kernel).div((c * kernel[0] * kernel[1]) ** 0.5)
            return x, weight, s.randn(len(counts), o) if bias else None, s.offsets(counts), stride, padding

        return Case("expert_conv2d", name, make)

    def channels_last(s: Source, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    groups = GROUPS | {"one_expert_takes_all": (0, 3, 0), "an_expert_gets_none": (1, 0, 2), "single_expert": (2,)}
    groups["odd_sizes"] = (9, 5, 7)
    cases = [case(name, counts, *((7, 9) if name == "odd_sizes" else (2, 2))) for name, counts in groups.items()]
    cases += [
        case("1x1", (1, 0, 2), kernel=(1, 1), padding=0),
        case("1x1_stride_2", (1, 0, 2), kernel=(1, 1), stride=2, padding=0, bias=False),
        case("stride_2", (1, 0, 2), stride=2),
        case("not_square", (1, 0, 2), kernel=(1, 3), stride=(1, 2), padding=(0, 2)),
        case("channels_last", (1, 0, 2), layout=channels_last),
        case("channels_last_stride_2_odd_sizes", (9, 5, 7), 17, 33, size=(9, 7), kernel=(3, 5), stride=2, layout=channels_last),
        case("channels_last_no_rows", (0, 0), layout=channels_last),
        case("one_channel_channels_last", (2, 1), 1, 2, layout=channels_last),
        case("strided", (1, 0, 2), layout=lambda s, x: s.strided(x)),
    ]
    return cases


CASES: list[Case] = [*_expert_conv2d_cases(), *_expert_linear_cases(), *_expert_sum_cases()]


def cases(op: str) -> list[Case]:
    """The cases of one operator."""
    return [case for case in CASES if case.op == op]


def operator(case: Case) -> Callable[..., Any]:
    """The public function of the case's operator."""
    return getattr(ops, case.op)


def as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def to_double(args: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def assert_matches(out: Any, low: Any, exact: Any, dtype: torch.dtype) -> None:
    """The tolerance rule: max|out - exact| <= 2 max|low - exact| + 2 eps(dtype) max|exact|; integers exactly.

    `exact` is the reference in fp64 and `low` the reference in `dtype`; each a tensor or a tuple of tensors.
    """
    for o, a, e in zip(as_tuple(out), as_tuple(low), as_tuple(exact), strict=True):
        assert o.shape == e.shape, f"shape {list(o.shape)}, expected {list(e.shape)}"
        if not e.is_floating_point():
            assert torch.equal(o.cpu(), e.cpu().to(o.dtype)), "integers differ"
            continue
        if e.numel() == 0:
            continue
        o, a, e = o.double().cpu(), a.double().cpu(), e.double().cpu()
        assert not o.isnan().any(), "NaN in the result: unwritten or wrongly read memory"
        error, slack = (o - e).abs().max(), (a - e).abs().max()
        bound = 2 * slack + 2 * torch.finfo(dtype).eps * e.abs().max()
        assert error <= bound, f"error {error:.3e} beyond the bound {bound:.3e} (reference's own error {slack:.3e})"


def _leaves(args: Sequence[Any], needed: Sequence[int]) -> tuple[Any, ...]:
    """The arguments as autograd leaves, of which `needed` want a gradient."""
    return tuple(
        a.detach().requires_grad_(i in needed) if isinstance(a, Tensor) and a.is_floating_point() else a
        for i, a in enumerate(args)
    )


def gradients(
    function: Callable[..., Any], args: Sequence[Any], needed: Sequence[int], grads: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of sum(outputs * grads) over the floating outputs that carry one, for the arguments `needed`."""
    leaves = _leaves(args, needed)
    outputs = [y for y in as_tuple(function(*leaves)) if y.is_floating_point()]
    pairs = [(y, g.to(y)) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
    wanted = [leaves[i] for i in needed]
    return torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs])


def check_values(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """The operator equals its reference, by the tolerance rule."""
    args = case.arguments(dtype, device)
    function = getattr(reference, case.op)
    assert_matches(operator(case)(*args), function(*args), function(*to_double(args)), dtype)


def differentiable(args: Sequence[Any]) -> tuple[int, ...]:
    return tuple(i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point())


def check_gradients(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """All gradients, and each alone with the other arguments frozen, equal the reference's."""
    args = case.arguments(dtype, device)
    function = getattr(reference, case.op)
    source = Source(torch.float64, device, seed=1)
    grads = [source.randn(*y.shape).to(dtype) for y in as_tuple(function(*args)) if y.is_floating_point()]
    every = differentiable(args)
    for needed in {every, *((i,) for i in every)}:
        out = gradients(operator(case), args, needed, grads)
        low = gradients(function, args, needed, grads)
        exact = gradients(function, to_double(args), needed, to_double(grads))
        assert_matches(out, low, exact, dtype)


def check_repeats(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """The same arguments twice give bitwise equal results."""
    args = case.arguments(dtype, device)
    for first, second in zip(as_tuple(operator(case)(*args)), as_tuple(operator(case)(*args)), strict=True):
        assert torch.equal(first, second)


def check_gradcheck(case: Case) -> None:
    """First and second derivatives in fp64 equal finite differences."""
    args = case.arguments(torch.float64)
    every = differentiable(args)

    def function(*leaves: Tensor) -> Any:
        full = list(args)
        for i, leaf in zip(every, leaves, strict=True):
            full[i] = leaf
        outputs = as_tuple(operator(case)(*full))
        return tuple(y for y in outputs if y.requires_grad) or sum(leaf.sum() * 0 for leaf in leaves)

    leaves = [args[i].detach().requires_grad_() for i in every]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


class _Recorder(TorchDispatchMode):
    """Collects the calls of this package's operators, those made in a backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "moe_kernels":
            self.calls.setdefault(str(func), (func, args))
        return func(*args, **(kwargs or {}))


def check_opcheck(case: Case) -> None:
    """torch.library.opcheck of every operator that the case reaches, forward and backward."""
    args = case.arguments(torch.float32)
    every = differentiable(args)
    with _Recorder() as recorder:
        outputs = as_tuple(operator(case)(*args))
        grads = [torch.ones_like(y) for y in outputs if y.is_floating_point()]
        if any(y.requires_grad for y in as_tuple(operator(case)(*_leaves(args, every)))):
            gradients(operator(case), args, every, grads)
    assert recorder.calls
    for func, call_args in recorder.calls.values():
        torch.library.opcheck(func, _leaves(call_args, differentiable(call_args)))
