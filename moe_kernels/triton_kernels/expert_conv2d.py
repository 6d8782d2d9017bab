"""Grouped 2-D convolution and its input gradient: one implicit GEMM over channels-last images.

Rows are (image, y, x), columns output channels, and the sum runs over (kh, kw, channel). The input gradient is the same
sum over the output gradient with the taps reversed, one residue of (y, x) modulo the stride at a time.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton_kernels import configs
from moe_kernels.triton_kernels.configs import Tile


# The interpreter keeps bfloat16 as integers and would multiply those.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in fp32, without TF32."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _find_expert(offsets_ptr, tile, positions, num_experts, BLOCK_M: tl.constexpr):
    """The expert of a tile: expert e owns the tiles from offsets[e] * positions // BLOCK_M + e on, which is room enough."""
    low = 0
    high = num_experts - 1
    while low < high:
        middle = (low + high + 1) // 2
        reached = tl.load(offsets_ptr + middle) * positions // BLOCK_M + middle <= tile
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return low, tile - tl.load(offsets_ptr + low) * positions // BLOCK_M - low


@triton.jit
def _expert_conv2d_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    offsets_ptr,
    num_experts,
    x_h,
    x_w,
    out_h,
    out_w,
    x_sn,
    x_sc,
    x_sh,
    x_sw,
    weight_se,
    weight_so,
    weight_sc,
    weight_sh,
    weight_sw,
    bias_se,
    bias_so,
    out_sn,
    out_so,
    out_sh,
    out_sw,
    C: tl.constexpr,
    O: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    o_blocks: tl.constexpr = tl.cdiv(O, BLOCK_N)
    c_blocks: tl.constexpr = tl.cdiv(C, BLOCK_K)

    # Output i of this program's grid lies at phase + step * i and meets x at start + sign * j under tap first + step * j.
    if TRANSPOSED:
        sign: tl.constexpr = -1
        step_h: tl.constexpr = STRIDE_H
        step_w: tl.constexpr = STRIDE_W
        phase_h = tl.program_id(1) // STRIDE_W
        phase_w = tl.program_id(1) % STRIDE_W
        first_h = (phase_h + PAD_H) % STRIDE_H
        first_w = (phase_w + PAD_W) % STRIDE_W
        taps_h = tl.cdiv(KH - first_h, STRIDE_H)
        taps_w = tl.cdiv(KW - first_w, STRIDE_W)
    else:
        sign: tl.constexpr = 1
        step_h: tl.constexpr = 1
        step_w: tl.constexpr = 1
        phase_h = 0
        phase_w = 0
        first_h = 0
        first_w = 0
        taps_h = KH
        taps_w = KW
    grid_h = tl.cdiv(out_h - phase_h, step_h)
    grid_w = tl.cdiv(out_w - phase_w, step_w)
    positions = grid_h * grid_w

    expert, tile = _find_expert(offsets_ptr, tl.program_id(0) // o_blocks, positions, num_experts, BLOCK_M)
    begin = tl.load(offsets_ptr + expert)
    rows = (tl.load(offsets_ptr + expert + 1) - begin) * positions
    if tile * BLOCK_M >= rows:
        return

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    image = (begin + row // positions).to(tl.int64)
    i_h = row % positions // grid_w
    i_w = row % grid_w
    if TRANSPOSED:
        start_h = i_h + (phase_h + PAD_H) // STRIDE_H
        start_w = i_w + (phase_w + PAD_W) // STRIDE_W
    else:
        start_h = i_h * STRIDE_H - PAD_H
        start_w = i_w * STRIDE_W - PAD_W
    start_h = tl.where(row < rows, start_h, -KH)  # rows of the next expert read nothing

    o = tl.program_id(0) % o_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_K)
    x_tile = (x_ptr + image * x_sn + start_h * x_sh + start_w * x_sw)[:, None] + c[None, :] * x_sc
    weight_tile = weight_ptr + expert.to(tl.int64) * weight_se + first_h * weight_sh + first_w * weight_sw
    weight_tile += c[:, None] * weight_sc + o[None, :] * weight_so
    in_o = (o < O) | (O % BLOCK_N == 0)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(taps_h * taps_w * c_blocks):
        tap = k // c_blocks
        c0 = k % c_blocks * BLOCK_K
        j_h = tap // taps_w
        j_w = tap % taps_w
        y = start_h + sign * j_h
        x = start_w + sign * j_w
        in_x = ((y >= 0) & (y < x_h) & (x >= 0) & (x < x_w))[:, None]
        in_weight = in_o[None, :]
        if C % BLOCK_K != 0:
            in_x &= (c < C - c0)[None, :]
            in_weight &= (c < C - c0)[:, None]
        a = tl.load(x_tile + (sign * (j_h * x_sh + j_w * x_sw) + c0 * x_sc), mask=in_x, other=0.0)
        tap_offset = step_h * j_h * weight_sh + step_w * j_w * weight_sw
        b = tl.load(weight_tile + (tap_offset + c0 * weight_sc), mask=in_weight, other=0.0)
        acc = dot(a, b, acc)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + expert * bias_se + o * bias_so, mask=in_o, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    out_rows = out_ptr + image * out_sn + (phase_h + step_h * i_h) * out_sh + (phase_w + step_w * i_w) * out_sw
    out_mask = (row < rows)[:, None] & in_o[None, :]
    tl.store(out_rows[:, None] + o[None, :] * out_so, acc.to(out_ptr.dtype.element_ty), mask=out_mask)


def expert_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    relu: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """Image j of expert e: conv2d(x[j], weight[e]) + bias[e], and its ReLU on request.

    Args:
        x: [N, C, H, W], fastest in channels-last memory.
        weight: [E, O, C, kh, kw], fastest with C innermost in memory.
        bias: [E, O] or None.
        offsets: int32 [E + 1].
        stride: (vertical, horizontal).
        padding: (vertical, horizontal).
        relu: whether negative outputs become zero.
        tile: None for the configured one.

    Returns:
        [N, O, H', W'] in x's memory format.
    """
    size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], padding, weight.shape[3:], stride, strict=True)]
    out = empty_like_images(x, x.shape[0], weight.shape[1], *size)
    _launch(x, weight, bias, offsets, out, stride, padding, False, relu, tile)
    return out


def expert_conv2d_input_grad(
    grad: Tensor,
    weight: Tensor,
    offsets: Tensor,
    height: int,
    width: int,
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Gradient of `expert_conv2d` in its images: grad [N, O, H', W'] -> [N, C, height, width]."""
    out = empty_like_images(grad, grad.shape[0], weight.shape[2], height, width)
    _launch(grad, weight.transpose(1, 2), None, offsets, out, stride, padding, True, False, tile)
    return out


def empty_like_images(like: Tensor, *shape: int) -> Tensor:
    """Unwritten images in the memory format of others."""
    last = not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def fit(block: int, size: int) -> int:
    """A block no wider than the next power of two, and no narrower than tl.dot takes."""
    return max(16, min(block, triton.next_power_of_2(size)))


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    out: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    transposed: bool,
    relu: bool,
    tile: Tile | None,
) -> None:
    if out.numel() == 0:
        return
    tile = tile or configs.choose(configs.EXPERT_CONV2D, x.device)[x.element_size()]
    experts, channels_out, channels, kh, kw = weight.shape
    block_n, block_k = fit(tile.n, channels_out), fit(tile.k, channels)
    phases = stride if transposed else (1, 1)
    positions = triton.cdiv(out.shape[2], phases[0]) * triton.cdiv(out.shape[3], phases[1])
    assert out.shape[0] * positions < 2**31 and x[0].numel() < 2**31 and weight[0].numel() < 2**31
    tiles = out.shape[0] * positions // tile.m + experts
    _expert_conv2d_kernel[(tiles * triton.cdiv(channels_out, block_n), phases[0] * phases[1])](
        x,
        weight,
        bias,
        out,
        offsets,
        experts,
        *x.shape[2:],
        *out.shape[2:],
        *x.stride(),
        *weight.stride(),
        *((0, 0) if bias is None else bias.stride()),
        *out.stride(),
        C=channels,
        O=channels_out,
        KH=kh,
        KW=kw,
        STRIDE_H=stride[0],
        STRIDE_W=stride[1],
        PAD_H=padding[0],
        PAD_W=padding[1],
        TRANSPOSED=transposed,
        RELU=relu,
        BLOCK_M=tile.m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
