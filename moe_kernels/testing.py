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
    """Arguments for one operator. `make` draws them from a source of a given dtype.

    `gradcheck` is False where the gradient is by definition not the derivative, as behind a straight-through gate.
    """

    op: str
    name: str
    make: Callable[[Source], tuple[Any, ...]]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    gradcheck: bool = True
    has_gradient: bool = True

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


# Rows, experts and k of a routing.
ROUTINGS: dict[str, tuple[int, int, int]] = {
    "no_rows": (0, 3, 2),
    "one_row": (1, 3, 2),
    "single_expert": (5, 1, 1),
    "top_1": (7, 4, 1),
    "top_2": (7, 4, 2),
    "all_experts": (5, 3, 3),
    "odd_sizes": (63, 129, 3),
}


def _topk_route_cases() -> list[Case]:
    def case(name: str, sizes: tuple[int, int, int], gate: str, renormalize: bool | None, strided: bool) -> Case:
        rows, experts, k = sizes
        return Case(
            "topk_route",
            f"{gate}_{name}",
            lambda s: ((s.strided if strided else lambda x: x)(s.randn(rows, experts)), k, gate, renormalize),
            gradcheck=gate != "straight_through",
        )

    gates = ("softmax", "sigmoid", "hard", "straight_through")
    cases = [case(name, sizes, gate, None, False) for gate in gates for name, sizes in ROUTINGS.items()]
    for gate in gates:
        cases += [
            case("plain", (7, 5, 2), gate, False, False),
            case("renormalized_top_1", (7, 4, 1), gate, True, False),
            case("strided", (7, 5, 2), gate, None, True),
        ]
    return [*cases, case("all_experts", (5, 3, 3), "soft", None, False)]


def _group_by_expert_cases() -> list[Case]:
    def case(name: str, make: Callable[[Source], Tensor], num_experts: int) -> Case:
        return Case("group_by_expert", name, lambda s: (make(s), num_experts), dtypes=(torch.float32,))

    cases = [case(name, lambda s, n=rows, e=e, k=k: s.randint(e, n, k), e) for name, (rows, e, k) in ROUTINGS.items()]
    return [
        *cases,
        case("flat_int64", lambda s: s.randint(4, 9).long(), 4),
        case("one_expert_takes_all", lambda s: s.randint(1, 6, 2) + 2, 4),
        case("strided", lambda s: s.randint(4, 2, 9).T, 4),
        case("many_blocks", lambda s: s.randint(7, 5001, 3), 7),
    ]


def _combine_cases() -> list[Case]:
    def case(name: str, rows: int, k: int, width: tuple[int, ...], strided: bool = False) -> list[Case]:
        def make(s: Source, op: str) -> tuple[Tensor, ...]:
            lay = s.strided if strided else lambda x: x
            position = s.rand(rows * k, dtype=torch.float64).argsort().int().view(rows, k)
            weights = lay(s.rand(rows, k, dtype=torch.promote_types(s.dtype, torch.float32)))
            y, grad = lay(s.randn(rows * k, *width)), lay(s.randn(rows, *width))
            return {
                "combine": (y, weights, position),
                "combine_input_grad": (grad, weights, position),
                "combine_weight_grad": (grad, y, position),
            }[op]

        ops = ("combine", "combine_input_grad", "combine_weight_grad")
        return [Case(op, name, lambda s, op=op: make(s, op)) for op in ops]

    cases = [
        c for name, (rows, _, k) in ROUTINGS.items() for c in case(name, rows, k, (300 if name == "odd_sizes" else 3,))
    ]
    return [*cases, *case("images", 3, 2, (2, 3, 3)), *case("scalars", 4, 2, ()), *case("strided", 4, 2, (5,), True)]


def _pgd_step_cases() -> list[Case]:
    radii = {"Linf": (0.1, 0.05), "L2": (0.9, 0.4), "L1": (4.0, 2.0)}
    channels_last = torch.channels_last

    def case(
        name: str,
        norm: str,
        shape: tuple[int, ...],
        *,
        per_sample: bool = False,
        grad: torch.dtype | None = None,
        layout: Callable[[Source, Tensor], Tensor] = lambda s, x: x,
    ) -> Case:
        def make(s: Source) -> tuple[Any, ...]:
            x = s.rand(*shape)
            x_adv = (x + radii[norm][0] * s.randn(*shape).clamp(-1, 1)).clamp(0, 1)
            eps, alpha = (s.rand(shape[0]) * 2 * r if per_sample else r for r in radii[norm])
            return layout(s, x_adv), s.randn(*shape, dtype=grad), layout(s, x), eps, alpha, norm

        return Case("pgd_step_", f"{norm}_{name}", make, (torch.float64, torch.float32), has_gradient=False)

    cases = []
    for norm in radii:
        cases += [
            case("no_rows", norm, (0, 3, 2)),
            case("no_elements", norm, (2, 0)),
            case("one_row", norm, (1, 3, 5, 5)),
            case("one_element", norm, (3,)),
            case("odd_sizes", norm, (3, 63, 129)),
            case("per_sample", norm, (5, 3, 7, 9), per_sample=True),
            case("bf16_grad", norm, (2, 130), grad=torch.bfloat16),
            case("channels_last", norm, (2, 3, 7, 9), layout=lambda s, x: x.contiguous(memory_format=channels_last)),
            case("strided", norm, (2, 3, 9), layout=Source.strided),
        ]
    return cases


def _kl_divergence_cases() -> list[Case]:
    def case(name: str, rows: int, classes: int, scale: float = 1.0, strided: bool = False) -> Case:
        def make(s: Source) -> tuple[Tensor, ...]:
            logits = (scale * s.randn(rows, classes) for _ in range(2))
            return tuple(s.strided(x) if strided else x for x in logits)

        # In fp64 the reference's own rounding of log p - log q exceeds the rule's two ulps: see test_kl_divergence.py.
        return Case("kl_divergence", name, make, (torch.float32, torch.bfloat16))

    return [
        case("no_rows", 0, 4),
        case("one_row", 1, 10),
        case("one_class", 3, 1),
        case("odd_sizes", 63, 129),
        case("confident", 5, 7, scale=20.0),
        case("strided", 4, 5, strided=True),
    ]


CASES: list[Case] = [
    *_expert_linear_cases(),
    *_expert_sum_cases(),
    *_topk_route_cases(),
    *_group_by_expert_cases(),
    *_combine_cases(),
    *_pgd_step_cases(),
    *_kl_divergence_cases(),
]


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
    if not pairs:
        return ()
    wanted = [leaves[i] for i in needed]
    return torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs])


def check_values(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """The operator equals its reference, by the tolerance rule."""
    function = getattr(reference, case.op)
    out, low = (f(*case.arguments(dtype, device)) for f in (operator(case), function))
    assert_matches(out, low, function(*to_double(case.arguments(dtype, device))), dtype)


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
    first_run, second_run = (as_tuple(operator(case)(*case.arguments(dtype, device))) for _ in range(2))
    for first, second in zip(first_run, second_run, strict=True):
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
    if not leaves:
        return
    if case.gradcheck:
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
        if case.has_gradient and any(y.requires_grad for y in as_tuple(operator(case)(*_leaves(args, every)))):
            gradients(operator(case), args, every, grads)
    assert recorder.calls
    for func, call_args in recorder.calls.values():
        wanted = differentiable(call_args) if case.has_gradient else ()
        torch.library.opcheck(func, _leaves(call_args, wanted))
