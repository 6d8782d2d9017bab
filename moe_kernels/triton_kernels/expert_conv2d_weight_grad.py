"""Weight gradient of the grouped 2-D convolution: dW[e] = sum over expert e's positions of grad^T x, tap by tap.

Where the tiles of dW are too few to fill the device, each expert's positions are cut into equal parts, whose sums are
added in a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton_kernels import configs
from moe_kernels.triton_kernels.configs import Tile
from moe_kernels.triton_kernels.expert_conv2d import dot, fit

PROGRAMS = 512  # about two waves of one large GPU
LEAST_ROWS = 1024  # a part of the sum shorter than this is not worth its fp32 partial result


@triton.jit
def _expert_conv2d_weight_grad_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    offsets_ptr,
    parts,
    x_h,
    x_w,
    grad_sn,
    grad_so,
    grad_sh,
    grad_sw,
    x_sn,
    x_sc,
    x_sh,
    x_sw,
    out_sp,
    out_se,
    out_so,
    out_sc,
    out_sh,
    out_sw,
    C: tl.constexpr,
    O: tl.constexpr,
    KW: tl.constexpr,
    OUT_H: tl.constexpr,
    OUT_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    o_blocks: tl.constexpr = tl.cdiv(O, BLOCK_M)
    c_blocks: tl.constexpr = tl.cdiv(C, BLOCK_N)
    positions: tl.constexpr = OUT_H * OUT_W
    pid = tl.program_id(0)
    c = pid % c_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    o = pid // c_blocks % o_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    kh = pid // (c_blocks * o_blocks) // KW
    kw = pid // (c_blocks * o_blocks) % KW
    expert = tl.program_id(1) // parts
    part = tl.program_id(1) % parts
    in_c = (c < C) | (C % BLOCK_N == 0)
    in_o = (o < O) | (O % BLOCK_M == 0)

    begin = tl.load(offsets_ptr + expert)
    rows = (tl.load(offsets_ptr + expert + 1) - begin) * positions
    steps = tl.cdiv(tl.cdiv(rows, BLOCK_K), parts)
    first = part * steps * BLOCK_K
    last = tl.minimum(first + steps * BLOCK_K, rows)

    grad_columns = grad_ptr + o[None, :] * grad_so
    x_columns = x_ptr + kh * x_sh + kw * x_sw + c[None, :] * x_sc
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        image = (begin + row // positions).to(tl.int64)
        i_h = row % positions // OUT_W
        i_w = row % OUT_W
        y = i_h * STRIDE_H - PAD_H
        x = i_w * STRIDE_W - PAD_W
        inside = ((row < last) & (y >= -kh) & (y < x_h - kh) & (x >= -kw) & (x < x_w - kw))[:, None]
        grad_rows = (image * grad_sn + i_h * grad_sh + i_w * grad_sw)[:, None]
        x_rows = (image * x_sn + y * x_sh + x * x_sw)[:, None]
        a = tl.load(grad_columns + grad_rows, mask=inside & in_o[None, :], other=0.0)  # [positions, O]
        b = tl.load(x_columns + x_rows, mask=inside & in_c[None, :], other=0.0)  # [positions, C]
        acc = dot(tl.trans(a), b, acc)

    out_tile = out_ptr + part.to(tl.int64) * out_sp + expert.to(tl.int64) * out_se + kh * out_sh + kw * out_sw
    tl.store(
        out_tile + o[:, None] * out_so + c[None, :] * out_sc,
        acc.to(out_ptr.dtype.element_ty),
        in_o[:, None] & in_c[None, :],
    )


def expert_conv2d_weight_grad(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    height: int,
    width: int,
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    tile: Tile | None = None,
    parts: int | None = None,
) -> Tensor:
    """Gradient of `expert_conv2d` in its weight, the same bits every time.

    Args:
        grad: [N, O, H', W'], fastest in channels-last memory.
        x: [N, C, H, W], likewise.
        offsets: int32 [E + 1].
        height: of the kernel.
        width: of the kernel.
        stride: (vertical, horizontal).
        padding: (vertical, horizontal).
        tile: None for the configured one.
        parts: in how many parts to sum each expert's positions; None to fill the device.

    Returns:
        [E, O, C, height, width] with C innermost in memory; zeros for an expert without images.
    """
    tile = tile or configs.choose(configs.EXPERT_CONV2D_WEIGHT_GRAD, x.device)[x.element_size()]
    experts, rows = offsets.shape[0] - 1, grad.shape[0] * grad.shape[2] * grad.shape[3]
    channels_out, channels = grad.shape[1], x.shape[1]
    block_m, block_n = fit(tile.m, channels_out), fit(tile.n, channels)
    tiles = triton.cdiv(channels_out, block_m) * triton.cdiv(channels, block_n) * height * width
    if parts is None:
        parts = max(1, min(PROGRAMS // (tiles * experts), rows // (LEAST_ROWS * experts)))
    assert rows < 2**31 and grad.stride(0) < 2**31 and x.stride(0) < 2**31
    out = torch.empty(
        (parts, experts, channels_out, height, width, channels),
        dtype=x.dtype if parts == 1 else torch.float32,
        device=x.device,
    ).permute(0, 1, 2, 5, 3, 4)
    _expert_conv2d_weight_grad_kernel[(tiles, experts * parts)](
        grad,
        x,
        out,
        offsets,
        parts,
        *x.shape[2:],
        *grad.stride(),
        *x.stride(),
        *out.stride(),
        C=channels,
        O=channels_out,
        KW=width,
        OUT_H=grad.shape[2],
        OUT_W=grad.shape[3],
        STRIDE_H=stride[0],
        STRIDE_W=stride[1],
        PAD_H=padding[0],
        PAD_W=padding[1],
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out[0] if parts == 1 else out.sum(0).to(x.dtype)
