"""Weight gradient of the grouped linear layer: dweight[e] = sum of grad[j] x[rows[j]]^T over the rows of expert e."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton_kernels import configs, tuning
from moe_kernels.triton_kernels.configs import Tile
from moe_kernels.triton_kernels.launch import Launch, descriptor, strides
from moe_kernels.triton_kernels.tiles import at, dot, grouped_order


@triton.jit
def _load_rows(
    x, rows, row0, end, col0, width, stride_m, stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LAYOUT: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of x at (row0, col0), zero beyond its width and, in the TAIL, beyond the expert's end."""
    row = row0 + tl.arange(0, BLOCK_M)
    if LAYOUT == "TMA":
        block = x.load([row0, col0])
        if TAIL:
            block = tl.where((row < end)[:, None], block, 0.0)
        return block
    else:
        cols = col0 + tl.arange(0, BLOCK_N)[None, :]
        mask = cols < width
        if TAIL:
            mask &= (row < end)[:, None]
        if rows is not None:
            row = tl.load(rows + row, mask=row < end, other=0)
        return tl.load(x + at(row, stride_m)[:, None] + at(cols, stride_n), mask=mask, other=0.0)


@triton.jit
def _expert_linear_weight_grad_kernel(
    grad,  # [N, n], or its descriptor
    x,  # [N, k] or, with rows, [T, k]; or its descriptor
    offsets,  # [E + 1]
    rows,  # [N] or None
    out,  # [E, n, k]
    n, k, g_stride_m, g_stride_n, x_stride_m, x_stride_k, o_stride_e, o_stride_n, o_stride_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_N: tl.constexpr,
    G_LAYOUT: tl.constexpr, X_LAYOUT: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles_k = tl.cdiv(k, BLOCK_K)
    expert = tl.program_id(0) // (tiles_n * tiles_k)
    tile_n, tile_k = grouped_order(tl.program_id(0) % (tiles_n * tiles_k), tiles_n, tiles_k, GROUP_N)
    col_n = tile_n * BLOCK_N
    col_k = tile_k * BLOCK_K
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    tail = begin + (end - begin) // BLOCK_M * BLOCK_M
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for row in range(begin, tail, BLOCK_M):
        g = _load_rows(grad, None, row, end, col_n, n, g_stride_m, g_stride_n, BLOCK_M, BLOCK_N, G_LAYOUT, False)
        b = _load_rows(x, rows, row, end, col_k, k, x_stride_m, x_stride_k, BLOCK_M, BLOCK_K, X_LAYOUT, False)
        acc = dot(g.trans(), b, acc)
    if tail < end:
        g = _load_rows(grad, None, tail, end, col_n, n, g_stride_m, g_stride_n, BLOCK_M, BLOCK_N, G_LAYOUT, True)
        b = _load_rows(x, rows, tail, end, col_k, k, x_stride_m, x_stride_k, BLOCK_M, BLOCK_K, X_LAYOUT, True)
        acc = dot(g.trans(), b, acc)
    ns = (col_n + tl.arange(0, BLOCK_N))[:, None]
    ks = (col_k + tl.arange(0, BLOCK_K))[None, :]
    pointers = out + at(expert, o_stride_e) + at(ns, o_stride_n) + at(ks, o_stride_k)
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(ns < n) & (ks < k))


def expert_linear_weight_grad(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    rows: Tensor | None = None,
    *,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Sums grad[j] x[j]^T over each expert's rows, without atomics and so bitwise repeatable.

    Args:
        grad: [N, out].
        x: [N, in] sorted by expert; with `rows`, [T, in] in any order.
        offsets: int32 [E + 1].
        rows: int32 [N]; sorted row j reads x[rows[j]].
        out: [E, out, in] with any strides, or None to allocate it. To gather the rows of `grad` instead of those of
            `x`, swap the two and pass `out` transposed.
        tile: None for the configured one.

    Returns:
        [E, out, in]; zeros for an expert without rows.
    """
    num_experts = offsets.shape[0] - 1
    if out is None:
        out = grad.new_empty(num_experts, grad.shape[1], x.shape[1])
    if out.numel() > 0:
        make = partial(_weight_grad, grad, x, offsets, rows, out)
        if tile is None:
            table = configs.choose(configs.EXPERT_LINEAR_WEIGHT_GRAD, x.device)
            tile = tuning.choose(make, table[x.element_size()][configs.size(grad.shape[0], num_experts)])
        make(tile).run()
    return out


def _weight_grad(grad: Tensor, x: Tensor, offsets: Tensor, rows: Tensor | None, out: Tensor, tile: Tile) -> Launch:
    num_experts, n, k = out.shape
    block_n = min(tile.m, max(16, triton.next_power_of_2(n)))
    block_k = min(tile.n, max(16, triton.next_power_of_2(k)))
    g_operand = descriptor(grad, [tile.k, block_n]) if tile.tma else None
    x_operand = descriptor(x, [tile.k, block_k]) if tile.tma and rows is None else None
    return Launch(
        _expert_linear_weight_grad_kernel,
        (num_experts * triton.cdiv(n, block_n) * triton.cdiv(k, block_k),),
        {
            "grad": grad if g_operand is None else g_operand,
            "x": x if x_operand is None else x_operand,
            "offsets": offsets,
            "rows": rows,
            "out": out,
            "n": n,
            "k": k,
            **strides("g", grad, "mn"),
            **strides("x", x, "mk"),
            **strides("o", out, "enk"),
            "BLOCK_M": tile.k,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "GROUP_N": 8,
            "G_LAYOUT": "pointer" if g_operand is None else "TMA",
            "X_LAYOUT": "pointer" if x_operand is None else "TMA",
        },
        tile.num_warps,
        tile.num_stages,
        tensor_cores=x.dtype != torch.float32,  # fp32 is not rounded to tf32
    )


def static_launches() -> Iterator[tuple[int | str, str, Launch]]:
    """(architecture in the table, name, launch on meta tensors) of every shipped configuration, to be compiled."""
    one = torch.empty(1, 1, 1, device="meta")  # the compiler treats integers of value 1 as constants
    arguments = one[0], one[0], one.new_empty(2, dtype=torch.int32), None, one
    yield 90, "expert_linear dW of ones", _weight_grad(*arguments, configs.EXPERT_LINEAR_WEIGHT_GRAD[90][4]["few"])
    num_rows, n, k, experts = 8192, 1024, 2048, 8
    for dtype in (torch.bfloat16, torch.float32):
        grad = torch.empty(num_rows, n, dtype=dtype, device="meta")
        x, out = grad.new_empty(num_rows, k), grad.new_empty(experts, n, k)
        offsets, rows = x.new_empty(experts + 1, dtype=torch.int32), x.new_empty(num_rows, dtype=torch.int32)
        for arch, by_bytes in configs.EXPERT_LINEAR_WEIGHT_GRAD.items():
            for size, tile in by_bytes[x.element_size()].items():
                shown = f"{dtype.itemsize * 8}-bit {size} {tile.m}x{tile.n}x{tile.k}"
                yield arch, f"expert_linear dW {shown}", _weight_grad(grad, x, offsets, None, out, tile)
                yield arch, f"expert_linear dW gather {shown}", _weight_grad(grad, x, offsets, rows, out, tile)
