"""Shared by the grouped GEMMs: the dot product, and finding a program's tile from the offsets, on the device."""

import triton
import triton.language as tl

# Triton's interpreter stores bf16 as integers that hold its bits, and would multiply those integers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def max_tiles(num_rows: int, num_experts: int, block: int) -> int:
    """Upper bound on the number of tiles of `block` rows, however the rows are distributed over the experts."""
    return num_rows // block + num_experts


@triton.jit
def at(index, stride):
    """Memory offset of an index along an axis, in 64 bits: each factor fits in 32, but the product may not."""
    return tl.cast(index, tl.int64) * stride


@triton.jit
def tile_ends(offsets, num_experts, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """[EXPERTS] running total of tiles up to and including each expert; EXPERTS is the power of two >= num_experts."""
    expert = tl.arange(0, EXPERTS)
    real = expert < num_experts
    begin = tl.load(offsets + expert, mask=real, other=0)
    end = tl.load(offsets + expert + 1, mask=real, other=0)
    return tl.cumsum(tl.cdiv(end - begin, BLOCK), 0)


@triton.jit
def find_tile(offsets, ends, tile, BLOCK: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a tile; `ends` comes from tile_ends."""
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    tiles_before = tl.max(tl.where(ends <= tile, ends, 0), 0)
    first = tl.load(offsets + expert) + (tile - tiles_before) * BLOCK
    return expert, first, tl.load(offsets + expert + 1)


@triton.jit
def grouped_order(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row tile, column tile), running down GROUP_M row tiles before the next column, so that operands stay in L2."""
    per_group = GROUP_M * tiles_n
    first_m = tile // per_group * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    return first_m + tile % per_group % group_m, tile % per_group // group_m


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, accumulated in fp32; fp32 operands are not rounded to tf32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
