"""Grouped GEMM over a batch sorted by expert, in one kernel: y[j] = act(x[rows[j]] @ weight[e].T + bias[e])."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton_kernels import configs, tuning
from moe_kernels.triton_kernels.activations import ACTIVATIONS, GATED, activate
from moe_kernels.triton_kernels.configs import Tile
from moe_kernels.triton_kernels.launch import Launch, descriptor, num_programs, strides
from moe_kernels.triton_kernels.tiles import at, dot, find_tile, grouped_order, max_tiles, tile_ends


@triton.jit
def _load_weight(
    weight, expert, col, k0, n, k, w_stride_e, w_stride_n, w_stride_k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K, BLOCK_N] of weight[expert].T at (k0, col), zero outside [k, n]."""
    if LAYOUT == "NK":
        return weight.load([expert, col, k0]).reshape(BLOCK_N, BLOCK_K).trans()
    elif LAYOUT == "KN":
        return weight.load([expert, k0, col]).reshape(BLOCK_K, BLOCK_N)
    else:
        cols = col + tl.arange(0, BLOCK_N)[None, :]
        ks = k0 + tl.arange(0, BLOCK_K)[:, None]
        pointers = weight + at(expert, w_stride_e) + at(cols, w_stride_n) + at(ks, w_stride_k)
        return tl.load(pointers, mask=(cols < n) & (ks < k), other=0.0)


@triton.jit
def _finish(
    acc, acc2, bias, y, z, expert, first, end, col, n, b_stride_e, b_stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Adds the bias, stores the pre-activation unless z is None, and stores the activation."""
    row = tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, BLOCK_N)
    mask = (row < end - first) & (cols < n - col)[None, :]
    if bias is not None:
        bias_e = bias + at(expert, b_stride_e) + at(col, b_stride_n)
        acc += tl.load(bias_e + at(cols, b_stride_n), mask=cols < n - col, other=0.0).to(tl.float32)[None, :]
        if GATED:
            bias2_e = bias_e + at(n, b_stride_n)
            acc2 += tl.load(bias2_e + at(cols, b_stride_n), mask=cols < n - col, other=0.0).to(tl.float32)[None, :]
    y += at(first, n) + col
    out = at(row, n) + cols[None, :]
    # The activation is taken of z as stored, so that a backward that recomputes it differentiates exactly this value.
    value = acc.to(y.dtype.element_ty)
    if GATED:
        value2 = acc2.to(y.dtype.element_ty)
        if z is not None:
            z += at(first, n) * 2 + col
            z_out = at(row, n) * 2 + cols[None, :]
            tl.store(z + z_out, value, mask=mask)
            tl.store(z + n + z_out, value2, mask=mask)
        value = (activate(value.to(tl.float32), ACTIVATION) * value2.to(tl.float32)).to(value.dtype)
    elif ACTIVATION is not None:
        if z is not None:
            tl.store(z + at(first, n) + col + out, value, mask=mask)
        value = activate(value.to(tl.float32), ACTIVATION).to(value.dtype)
    tl.store(y + out, value, mask=mask)


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()


@triton.jit
def _finish_halves(
    acc, acc2, bias, y, z, expert, first, end, col, n, b_stride_e, b_stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    left, right = _halves(acc, BLOCK_M, BLOCK_N)
    left2, right2 = _halves(acc2, BLOCK_M, BLOCK_N)
    _finish(
        left, left2, bias, y, z, expert, first, end, col, n, b_stride_e, b_stride_n,
        BLOCK_M, BLOCK_N // 2, ACTIVATION, GATED,
    )  # fmt: skip
    _finish(
        right, right2, bias, y, z, expert, first, end, col + BLOCK_N // 2, n, b_stride_e, b_stride_n,
        BLOCK_M, BLOCK_N // 2, ACTIVATION, GATED,
    )  # fmt: skip


@triton.jit
def _expert_linear_fwd_kernel(
    x,  # [N, k] or, with rows, [T, k]; its descriptor where X_LAYOUT is "TMA"
    weight,  # [E, n, k], or [E, 2 n, k] where GATED; a descriptor where W_LAYOUT is "NK" or "KN"
    bias,  # [E, n or 2 n] or None
    offsets,  # [E + 1]
    rows,  # [N] or None
    y,  # [N, n]
    z,  # [N, n or 2 n] or None: the pre-activation
    num_experts, n, k,
    x_stride_m, x_stride_k, w_stride_e, w_stride_n, w_stride_k, b_stride_e, b_stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, X_LAYOUT: tl.constexpr, W_LAYOUT: tl.constexpr,
    EXPERTS: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    ends = tile_ends(offsets, num_experts, BLOCK_M, EXPERTS)
    tiles_m = tl.max(ends, 0)
    tiles_n = tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=PERSISTENT):
        tile_m, tile_n = grouped_order(tile, tiles_m, tiles_n, GROUP_M)
        expert, first, end = find_tile(offsets, ends, tile_m, BLOCK_M)
        col = tile_n * BLOCK_N
        if X_LAYOUT == "pointer":
            row = first + tl.arange(0, BLOCK_M)
            source = tl.where(row < end, row, first)
            if rows is not None:
                source = tl.load(rows + source, mask=row < end, other=0)
            x_rows = x + at(source, x_stride_m)[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc2 = acc
        for k0 in range(0, k, BLOCK_K):
            if X_LAYOUT == "TMA":
                a = x.load([first, k0])
            else:
                ks = k0 + tl.arange(0, BLOCK_K)[None, :]
                a = tl.load(x_rows + at(ks, x_stride_k), mask=ks < k, other=0.0)
            b = _load_weight(
                weight, expert, col, k0, n, k, w_stride_e, w_stride_n, w_stride_k, BLOCK_N, BLOCK_K, W_LAYOUT
            )
            acc = dot(a, b, acc)
            if GATED:
                b2 = _load_weight(
                    weight, expert, n + col, k0, 2 * n, k, w_stride_e, w_stride_n, w_stride_k,
                    BLOCK_N, BLOCK_K, W_LAYOUT,
                )  # fmt: skip
                acc2 = dot(a, b2, acc2)

        left, right = _halves(acc, BLOCK_M, BLOCK_N)  # in quarters: otherwise the epilogue's temporaries spill
        left2, right2 = _halves(acc2, BLOCK_M, BLOCK_N)
        _finish_halves(
            left, left2, bias, y, z, expert, first, end, col, n, b_stride_e, b_stride_n,
            BLOCK_M, BLOCK_N // 2, ACTIVATION, GATED,
        )  # fmt: skip
        _finish_halves(
            right, right2, bias, y, z, expert, first, end, col + BLOCK_N // 2, n, b_stride_e, b_stride_n,
            BLOCK_M, BLOCK_N // 2, ACTIVATION, GATED,
        )  # fmt: skip


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    rows: Tensor | None = None,
    *,
    activation: str | None = None,
    z: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Applies each expert's linear map to its rows, and optionally the activation that follows.

    Args:
        x: [N, in] sorted by expert; with `rows`, [T, in] in any order.
        weight: [E, out, in] with any strides: the input gradient is the same call with weight.transpose(1, 2).
        bias: [E, out] or None.
        offsets: int32 [E + 1].
        rows: int32 [N]; sorted row j reads x[rows[j]].
        activation: None, or one of `activations.ACTIVATIONS`; a gated one is act(first half) * second half.
        z: contiguous [N, out] that receives the pre-activation, or None.
        tile: None for the configured one.

    Returns:
        [N, out], or [N, out / 2] for a gated activation.
    """
    num_rows = (x if rows is None else rows).shape[0]
    gated = activation in GATED
    y = x.new_empty(num_rows, weight.shape[1] // (2 if gated else 1))
    if y.numel() > 0:
        make = partial(forward_launch, x, weight, bias, offsets, rows, y, z, activation)
        if tile is None:
            table = configs.choose(configs.EXPERT_LINEAR_GATED if gated else configs.EXPERT_LINEAR, x.device)
            tile = tuning.choose(make, table[x.element_size()][configs.size(num_rows, weight.shape[0])])
        make(tile).run()
    return y


def forward_launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    rows: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    activation: str | None,
    tile: Tile,
) -> Launch:
    num_experts, _, k = weight.shape
    num_rows, n = y.shape
    assert activation is None or activation in ACTIVATIONS, activation
    assert y.is_contiguous() and (z is None or (z.is_contiguous() and z.shape == (num_rows, weight.shape[1])))
    block_n = min(tile.n, max(16, triton.next_power_of_2(n)))
    x_operand = w_operand = None
    w_layout = "NK"
    if tile.tma:
        x_operand = descriptor(x, [tile.m, tile.k]) if rows is None else None
        w_operand = descriptor(weight, [1, block_n, tile.k])
        if w_operand is None:
            w_operand, w_layout = descriptor(weight.transpose(1, 2), [1, tile.k, block_n]), "KN"
    tiles = max_tiles(num_rows, num_experts, tile.m) * triton.cdiv(n, block_n)
    return Launch(
        _expert_linear_fwd_kernel,
        (num_programs(tiles, x) if tile.tma else tiles,),
        {
            "x": x if x_operand is None else x_operand,
            "weight": weight if w_operand is None else w_operand,
            "bias": bias,
            "offsets": offsets,
            "rows": rows,
            "y": y,
            "z": z,
            "num_experts": num_experts,
            "n": n,
            "k": k,
            **strides("x", x, "mk"),
            **strides("w", weight, "enk"),
            **strides("b", bias, "en"),
            "BLOCK_M": tile.m,
            "BLOCK_N": block_n,
            "BLOCK_K": tile.k,
            "GROUP_M": 8,
            "ACTIVATION": GATED.get(activation, activation) if activation else None,
            "GATED": activation in GATED,
            "X_LAYOUT": "pointer" if x_operand is None else "TMA",
            "W_LAYOUT": "pointer" if w_operand is None else w_layout,
            "EXPERTS": triton.next_power_of_2(num_experts),
            "PERSISTENT": tile.tma and k > 0,  # flattening assumes that each tile has a step
        },
        tile.num_warps,
        tile.num_stages,
        tensor_cores=x.dtype != torch.float32,  # fp32 is not rounded to tf32
    )


def static_launches() -> Iterator[tuple[int | str, str, Launch]]:
    """(architecture in the table, name, launch on meta tensors) of every shipped configuration, to be compiled."""
    one = torch.empty(1, 1, 1, device="meta")  # the compiler treats integers of value 1 as constants
    for activation in (None, "swiglu"):
        weight = one.new_empty(1, 2, 1) if activation else one
        arguments = one[0], weight, weight[..., 0], one.new_empty(2, dtype=torch.int32), None, one[0], weight[..., 0]
        launch = forward_launch(*arguments, activation, configs.EXPERT_LINEAR_GATED[90][4]["few"])
        yield 90, f"expert_linear {activation or 'forward'} of ones", launch
    num_rows, d, hidden, experts = 8192, 2048, 1024, 8
    for dtype, table, activation in [
        (torch.bfloat16, configs.EXPERT_LINEAR, None),
        (torch.bfloat16, configs.EXPERT_LINEAR, "gelu"),
        (torch.bfloat16, configs.EXPERT_LINEAR_GATED, "swiglu"),
        (torch.bfloat16, configs.EXPERT_LINEAR_GATED, "geglu"),
        (torch.float32, configs.EXPERT_LINEAR, None),
        (torch.float32, configs.EXPERT_LINEAR_GATED, "geglu"),
    ]:
        out = 2 * hidden if activation in GATED else hidden
        x = torch.empty(num_rows, d, dtype=dtype, device="meta")
        weight = x.new_empty(experts, out, d)
        bias, y = x.new_empty(experts, out), x.new_empty(num_rows, hidden)
        z = x.new_empty(num_rows, out) if activation else None
        offsets, rows = x.new_empty(experts + 1, dtype=torch.int32), x.new_empty(num_rows, dtype=torch.int32)
        name = f"expert_linear {activation or 'forward'}"
        for arch, by_bytes in table.items():
            for size, tile in by_bytes[x.element_size()].items():
                shown = f"{dtype.itemsize * 8}-bit {size} {tile.m}x{tile.n}x{tile.k}"
                gathered = forward_launch(x, weight, bias, offsets, rows, y, z, activation, tile)
                yield arch, f"{name} gather {shown}", gathered
                if activation is None or tile.tma:
                    yield (
                        arch,
                        f"{name} {shown}",
                        forward_launch(x, weight, bias, offsets, None, y, z, activation, tile),
                    )
                if activation is None:
                    dx, back = x.new_empty(num_rows, d), weight.transpose(1, 2)
                    yield arch, f"{name} dX {shown}", forward_launch(y, back, None, offsets, None, dx, None, None, tile)
