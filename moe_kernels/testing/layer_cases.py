"""The arguments that the operators on batches sorted by expert must handle."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kernels import reference
from moe_kernels.reference.expert_mlp import GATED
from moe_kernels.testing.case import DTYPES, GROUPS, Case, Source


def _expert_linear_cases() -> list[Case]:
    def make(
        s: Source,
        counts: tuple[int, ...],
        k: int,
        n: int,
        bias: bool = True,
        gather: bool = False,
        strided: bool = False,
        transposed: bool = False,
    ) -> tuple[Any, ...]:
        rows, experts = sum(counts), len(counts)
        tokens = max(rows // 2, 1)
        x, weight = s.randn(tokens if gather else rows, k), s.randn(experts, n, k).div(max(k, 1) ** 0.5)
        if transposed:
            x, weight = (t.mT.contiguous().mT for t in (x, weight))
        return (
            s.strided(x) if strided else x,
            s.strided(weight) if strided else weight,
            s.randn(experts, n) if bias else None,
            s.offsets(counts),
            s.randint(tokens, rows) if gather else None,
        )

    def case(
        name: str,
        counts: tuple[int, ...],
        k: int,
        n: int,
        dtypes: tuple[torch.dtype, ...] = DTYPES,
        **options: bool,
    ) -> Case:
        return Case("expert_linear", name, lambda s: make(s, counts, k, n, **options), dtypes)

    cases = [case(name, counts, 63 if name == "odd_sizes" else 5, 4) for name, counts in GROUPS.items()]
    cases += [case(f"gather_{name}", counts, 6, 129 if name == "odd_sizes" else 3, gather=True)
              for name, counts in GROUPS.items()]  # fmt: skip
    cases += [
        case("no_bias", (4, 0, 5), 7, 3, bias=False),
        case("strided", (4, 0, 5), 7, 3, strided=True),
        case("strided_gather", (4, 0, 5), 7, 3, strided=True, gather=True),
        case("transposed", (4, 0, 5), 7, 3, transposed=True),
        case("no_columns", (4, 0, 5), 0, 3),
    ]
    # Sums longer than one block of the CPU kernels: over columns and, in the gradients, over results and over rows.
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    cases += [
        case("long_sums", (5, 0, 7), 530, 17, dtypes, gather=True),
        case("long_sums_of_results", (5, 0, 7), 17, 530, dtypes, transposed=True),
        case("long_sums_of_rows", (5, 0, 531), 19, 37, dtypes, bias=False),
    ]
    return cases


def _expert_mlp_cases() -> list[Case]:
    def output(
        name: str, tokens: int, num_experts: int, k: int, n: int, d: int, activation: str, **options: Any
    ) -> Case:
        def make(s: Source) -> tuple[Any, ...]:
            bias, combined, strided = (options.get(o, o != "strided") for o in ("bias", "combined", "strided"))
            experts = s.rand(tokens, num_experts).argsort(dim=1)[:, :k] // options.get("unused", 1)
            order, position, offsets = reference.group_by_expert(experts.int(), num_experts)
            z = s.randn(tokens * k, 2 * n if activation in GATED else n)
            weight = s.randn(num_experts, d, n).div(n**0.5)
            return (
                s.strided(z) if strided else z,
                weight,
                s.randn(num_experts, d) if bias else None,
                offsets,
                activation,
                *((s.rand(tokens, k, dtype=s.wide), position, order // k) if combined else (None, None, None)),
            )

        # Long sums not in fp64: <da, act(z)> and <dout, y> then differ by more than two ulps, as many terms cancel.
        return Case("expert_mlp_output", name, make, DTYPES[1:] if name in ("odd_sizes", "long_sums") else DTYPES)

    def hidden_grad(activation: str, needed: tuple[bool, ...]) -> Case:
        def make(s: Source) -> tuple[Any, ...]:
            z = s.randn(7, 10 if activation in GATED else 5)
            return s.randn(7, 5), z, s.rand(7, dtype=s.wide), activation, *needed

        name = "_".join((activation, *(str(int(n)) for n in needed)))
        return Case("expert_mlp_hidden_grad", name, make, has_gradient=all(needed))

    sizes = {
        "no_rows": (0, 3, 2),
        "one_row": (1, 3, 2),
        "single_expert": (5, 1, 1),
        "all_experts": (4, 3, 3),
        "top_1": (7, 3, 1),
    }
    activations = ("relu", "gelu", "silu", "relu2", "swiglu", "geglu")
    return [
        *(output(name, *size, 4, 3, "gelu") for name, size in sizes.items()),
        *(output(activation, 5, 3, 2, 4, 3, activation) for activation in activations),
        output("odd_sizes", 63, 9, 3, 17, 33, "swiglu"),
        output("long_sums", 63, 3, 2, 600, 17, "gelu"),
        output("one_expert_takes_all", 6, 4, 1, 3, 2, "silu", unused=4),
        output("no_bias", 5, 3, 2, 4, 3, "geglu", bias=False),
        output("sorted", 5, 3, 2, 4, 3, "swiglu", combined=False),
        output("strided", 5, 3, 2, 4, 3, "relu", strided=True),
        *(hidden_grad(activation, (True, True, True)) for activation in activations),
        *(hidden_grad("geglu", tuple(i == j for j in range(3))) for i in range(3)),
    ]


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

    groups = GROUPS | {"one_expert_takes_all": (0, 3, 0), "an_expert_gets_none": (1, 0, 2), "single_expert": (2,)}
    groups["odd_sizes"] = (9, 5, 7)
    cases = [case(name, counts, *((7, 9) if name == "odd_sizes" else (2, 2))) for name, counts in groups.items()]
    cases += [
        case("1x1", (1, 0, 2), kernel=(1, 1), padding=0),
        case("1x1_stride_2", (1, 0, 2), kernel=(1, 1), stride=2, padding=0, bias=False),
        case("stride_2", (1, 0, 2), stride=2),
        case("not_square", (1, 0, 2), kernel=(1, 3), stride=(1, 2), padding=(0, 2)),
        case("channels_last", (1, 0, 2), layout=Source.channels_last),
        case(
            "channels_last_stride_2_odd_sizes",
            (9, 5, 7),
            17,
            33,
            size=(9, 7),
            kernel=(3, 5),
            stride=2,
            layout=Source.channels_last,
        ),
        case("channels_last_no_rows", (0, 0), layout=Source.channels_last),
        case("one_channel_channels_last", (2, 1), 1, 2, layout=Source.channels_last),
        case("strided", (1, 0, 2), layout=Source.strided),
    ]
    return cases


def _winograd_conv2d_cases() -> list[Case]:
    def case(
        name: str,
        counts: tuple[int, ...],
        c: int = 2,
        o: int = 3,
        *,
        size: tuple[int, int] = (4, 5),
        padding: tuple[int, int] = (1, 1),
        bias: bool = True,
        layout: Callable[[Source, Tensor], Tensor] = lambda s, x: x,
    ) -> Case:
        def make(s: Source) -> tuple[Any, ...]:
            x = layout(s, s.randn(sum(counts), c, *size))
            weight = s.randn(len(counts), o, c, 3, 3).div((9 * c) ** 0.5)
            return x, weight, s.randn(len(counts), o) if bias else None, s.offsets(counts), padding

        return Case("winograd_conv2d", name, make, dtypes=(torch.float32, torch.bfloat16))

    groups = GROUPS | {"one_expert_takes_all": (0, 3, 0), "an_expert_gets_none": (1, 0, 2), "single_expert": (2,)}
    groups["odd_sizes"] = (9, 5, 7)
    return [
        *(case(name, counts, *((7, 9) if name == "odd_sizes" else (2, 3))) for name, counts in groups.items()),
        case("an_image_each", 20 * (1,)),
        case("one_pixel", (1, 2), size=(1, 1)),
        case("no_padding", (1, 2), size=(3, 6), padding=(0, 0), bias=False),
        case("not_square", (1, 0, 2), 17, 37, size=(9, 7), padding=(0, 2)),
        case("channels_last", (3, 0, 2), 17, 37, size=(8, 12), layout=Source.channels_last),
        case("one_channel_channels_last", (2, 1), 1, 2, layout=Source.channels_last),
        case("strided", (1, 0, 2), layout=Source.strided),
        case("row_longer_than_a_block", (1, 1), 5, 9, size=(4, 800)),
        case("many_channels", (50, 9), 40, 300, size=(7, 8)),
    ]


def _expert_batch_norm_cases() -> list[Case]:
    def case(
        name: str,
        counts: tuple[int, ...],
        *shape: int,
        training: bool = True,
        affine: bool = True,
        statistics: bool = True,
        fp32: bool = False,
        layout: Callable[[Source, Tensor], Tensor] = lambda s, x: x,
    ) -> Case:
        def make(s: Source) -> tuple[Any, ...]:
            x, table, dtype = s.randn(sum(counts), *shape), (len(counts), shape[0]), s.wide if fp32 else None
            weight, bias = (s.randn(*table, dtype=dtype), s.randn(*table, dtype=dtype)) if affine else (None, None)
            mean, var = (s.randn(*table, dtype=dtype), s.rand(*table, dtype=dtype) + 0.5)
            running = (mean, var) if statistics else (None, None)
            return layout(s, x), weight, bias, *running, s.offsets(counts), training, 0.1, 1e-3

        return Case("expert_batch_norm", name, make, DTYPES[2:] if fp32 else DTYPES, buffers=(3, 4))

    cases = []
    for name, counts in GROUPS.items():
        cases += [
            case(name, counts, 3),
            case(f"images_{name}", counts, *((7, 5, 9) if name == "odd_sizes" else (2, 2, 2))),
            case(f"eval_{name}", counts, 3, training=False),
        ]
    cases += [
        case("channels_last", (2, 0, 3), 3, 2, 2, layout=Source.channels_last),
        case("channels_last_odd_sizes", (9, 5, 7), 65, 7, 5, layout=Source.channels_last),
        case("strided", (2, 0, 3), 2, 2, 2, layout=Source.strided),
        case("eval_images", (2, 0, 3), 2, 2, 2, training=False),
        case("no_channels", (2, 0, 3), 0),
        case("no_pixels", (2, 0, 3), 2, 0, 3),
        case("eval_no_pixels", (2, 0, 3), 2, 0, 3, training=False),
        case("eval_channels_last", (2, 0, 3), 3, 2, 2, training=False, layout=Source.channels_last),
        case("no_affine", (2, 3), 3, affine=False),
        case("eval_no_affine", (2, 3), 3, training=False, affine=False),
        case("no_running_statistics", (2, 3), 3, statistics=False),
        case("fp32_parameters", (2, 3), 3, fp32=True),
    ]
    return cases


def _mask_relu_cases() -> list[Case]:
    def case(name: str, *shape: int, layout: Callable[[Source, Tensor], Tensor] = lambda s, x: x) -> Case:
        return Case("mask_relu", name, lambda s: (layout(s, s.randn(*shape).requires_grad_()),))

    def others(name: str, *rectifier: float | None) -> list[Case]:
        """Of other bounds or with a slope; and the same in place."""

        def make(s: Source) -> tuple[Any, ...]:
            return s.channels_last(s.randn(2, 3, 5, 7)), *rectifier

        return [
            Case("mask_relu_forward", name, lambda s: (make(s)[0].requires_grad_(), *rectifier)),
            Case("mask_relu_forward_", name, make, has_gradient=False),
        ]

    return [
        *others("relu"),
        *others("relu6", 0.0, 6.0),
        *others("hardtanh", -0.5, 0.25),
        *others("leaky", 0.0, None, 0.125),
        case("no_rows", 0, 5),
        case("one_element", 1),
        case("eight", 2, 4),
        case("odd_sizes", 63, 129),
        case("images", 2, 3, 3, 2),
        case("channels_last", 2, 3, 3, 2, layout=Source.channels_last),
        case("one_channel_channels_last", 2, 1, 3, 3, layout=Source.channels_last),
        case("transposed", 3, 5, layout=lambda s, x: x.T),
        case("strided", 3, 5, layout=Source.strided),
    ]


LAYER_CASES: list[Case] = [
    *_expert_batch_norm_cases(),
    *_expert_conv2d_cases(),
    *_expert_linear_cases(),
    *_expert_mlp_cases(),
    *_expert_sum_cases(),
    *_mask_relu_cases(),
    *_winograd_conv2d_cases(),
]
