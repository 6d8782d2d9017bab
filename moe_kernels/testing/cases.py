"""The arguments that every operator must handle: sizes, dtypes and layouts, drawn from a seed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kernels import reference
from moe_kernels.testing.case import Case, Source
from moe_kernels.testing.layer_cases import LAYER_CASES

# (rows, experts, k) of a routing.
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
    def case(
        gate: str, name: str, sizes: tuple[int, int, int], renormalize: bool | None = None, strided: bool = False
    ) -> Case:
        rows, experts, k = sizes

        def make(s: Source) -> tuple[Any, ...]:
            logits = s.randn(rows, experts)
            return s.strided(logits) if strided else logits, k, gate, renormalize

        return Case("topk_route", f"{gate}_{name}", make, gradcheck=gate != "straight_through")

    def backward(gate: str, renormalize: bool) -> Case:
        def make(s: Source) -> tuple[Any, ...]:
            logits = s.randn(4, 3)
            weights, experts = reference.topk_route(logits, 2)
            return s.randn(4, 2).to(weights.dtype), logits, experts, gate, renormalize

        return Case("topk_route_backward", f"{gate}_{'renormalized' if renormalize else 'as_is'}", make)

    cases = [case("softmax", name, sizes) for name, sizes in ROUTINGS.items()]
    for gate in ("sigmoid", "hard", "straight_through"):
        cases += [case(gate, name, ROUTINGS[name]) for name in ("top_1", "top_2", "odd_sizes")]
    return [
        *cases,
        *(backward(gate, renormalize) for gate in ("softmax", "sigmoid") for renormalize in (False, True)),
        *(case(gate, "top_2_as_is", (7, 4, 2), False) for gate in ("softmax", "sigmoid", "straight_through")),
        case("softmax", "renormalized_top_1", (7, 4, 1), True),
        case("softmax", "strided", (7, 5, 2), strided=True),
        case("soft", "all_experts", ROUTINGS["all_experts"]),
    ]


def _group_by_expert_cases() -> list[Case]:
    def case(name: str, experts: Callable[[Source], Tensor], num_experts: int) -> Case:
        return Case("group_by_expert", name, lambda s: (experts(s), num_experts), dtypes=(torch.float32,))

    def random(name: str) -> Case:
        rows, num_experts, k = ROUTINGS[name]
        return case(name, lambda s: s.randint(num_experts, rows, k), num_experts)

    return [
        *(random(name) for name in ROUTINGS),
        case("flat_int64", lambda s: s.randint(4, 9).long(), 4),
        case("one_expert_takes_all", lambda s: s.randint(1, 6, 2) + 2, 4),
        case("strided", lambda s: s.randint(4, 2, 9).T, 4),
        case("many_blocks", lambda s: s.randint(7, 5001, 3), 7),
    ]


def _combine_cases() -> list[Case]:
    def case(op: str, name: str, rows: int, k: int, width: tuple[int, ...], strided: bool = False) -> Case:
        def make(s: Source) -> tuple[Tensor, ...]:
            lay = s.strided if strided else lambda x: x
            position = s.rand(rows * k, dtype=torch.float64).argsort().int().view(rows, k)
            weights = lay(s.rand(rows, k, dtype=torch.promote_types(s.dtype, torch.float32)))
            y, grad = lay(s.randn(rows * k, *width)), lay(s.randn(rows, *width))
            return {
                "combine": (y, weights, position),
                "combine_input_grad": (grad, weights, position),
                "combine_weight_grad": (grad, y, position),
            }[op]

        return Case(op, name, make)

    return [
        *(
            c
            for op in ("combine", "combine_input_grad", "combine_weight_grad")
            for c in (
                case(op, "no_rows", 0, 2, (3,)),
                case(op, "odd_sizes", 63, 3, (300,)),
                case(op, "images", 3, 2, (2, 3, 3)),
                case(op, "strided", 4, 2, (5,), strided=True),
            )
        ),
        case("combine", "one_row", 1, 2, (3,)),
        case("combine", "top_1", 7, 1, (3,)),
        case("combine", "scalars", 4, 2, ()),
    ]


def _pgd_step_cases() -> list[Case]:
    radii = {"Linf": (0.1, 0.05), "L2": (0.9, 0.4), "L1": (4.0, 2.0)}

    def images(s: Source, norm: str, shape: tuple[int, ...], per_sample: bool) -> tuple[Any, ...]:
        x = s.rand(*shape, dtype=s.wide)
        x_adv = (x + radii[norm][0] * s.randn(*shape, dtype=s.wide).clamp(-1, 1)).clamp(0, 1)
        eps, alpha = (s.rand(shape[0], dtype=s.wide) * 2 * r if per_sample else r for r in radii[norm])
        return x_adv, x, eps, alpha

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
            x_adv, x, eps, alpha = images(s, norm, shape, per_sample)
            return layout(s, x_adv), s.randn(*shape, dtype=grad), layout(s, x), eps, alpha, norm

        return Case("pgd_step_", f"{norm}_{name}", make, (torch.float64, torch.float32), has_gradient=False)

    def normalized(
        name: str,
        norm: str,
        shape: tuple[int, ...],
        *,
        per_sample: bool = True,
        layout: Callable[[Source, Tensor], Tensor] = lambda s, x: x,
    ) -> Case:
        def make(s: Source) -> tuple[Any, ...]:
            x_adv, x, *magnitudes = images(s, norm, shape, per_sample)
            eps, alpha = (torch.as_tensor(r, dtype=s.wide, device=s.device).reshape(-1) for r in magnitudes)
            mean, std = (s.rand(shape[1], dtype=s.wide) + offset for offset in (0, 0.5))
            grad = layout(s, s.randn(*shape))
            return layout(s, x_adv), grad, layout(s, x), eps, alpha, norm, (0.0, 1.0), mean, std

        return Case("pgd_step_normalized_", f"{norm}_{name}", make, has_gradient=False)

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
            case("channels_last", norm, (2, 3, 7, 9), layout=Source.channels_last),
            case("strided", norm, (2, 3, 9), layout=Source.strided),
            normalized("no_rows", norm, (0, 3, 2, 2)),
            normalized("one_channel", norm, (2, 1, 4, 4)),
            normalized("one_element_per_channel", norm, (3, 10)),
            normalized("odd_sizes", norm, (3, 3, 7, 9), per_sample=False),
            normalized("packs_across_channels", norm, (2, 4, 3, 3)),
            normalized("whole_packs", norm, (2, 3, 4, 8)),
            normalized("channels_last", norm, (2, 3, 6, 8), layout=Source.channels_last),
            normalized("strided", norm, (2, 3, 9), layout=Source.strided),
        ]
    return cases


def _kl_divergence_cases() -> list[Case]:
    def case(name: str, rows: int, classes: int, scale: float = 1.0, strided: bool = False) -> Case:
        def make(s: Source) -> tuple[Tensor, ...]:
            logits = (scale * s.randn(rows, classes) for _ in range(2))
            return tuple(s.strided(x) if strided else x for x in logits)

        # In fp64 the reference's own rounding of log p - log q exceeds the tolerance rule's two ulps, so
        # test_kl_divergence.py tests fp64 by a tolerance of its own.
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
    *LAYER_CASES,
    *_combine_cases(),
    *_group_by_expert_cases(),
    *_kl_divergence_cases(),
    *_pgd_step_cases(),
    *_topk_route_cases(),
]


def cases(op: str) -> list[Case]:
    """The cases of one operator."""
    return [case for case in CASES if case.op == op]
