"""Weight gradient of the grouped 2-D convolution: dW[e] = sum over expert e's positions of grad^T x, tap by tap.

If dW has too few tiles to fill the device, each expert's positions are split into equal parts, whose sums are added in
a fixed order.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels._layout import channels_innermost
from moe_kernels.triton_kernels import configs, tuning
from moe_kernels.triton_kernels.configs import Tile
from moe_kernels.triton_kernels.expert_conv2d import check_counts, empty_images, fit
from moe_kernels.triton_kernels.launch import Launch, strides
from moe_kernels.triton_kernels.tiles import at, dot

PROGRAMS = 512  # about two waves of one large GPU
LEAST_ROWS = 1024  # a shorter part of the sum is not worth writing its fp32 partial result


@triton.jit
def _expert_conv2d_weight_grad_kernel(
    grad,  # [N, OUT_H, OUT_W, C_OUT]
    x,  # [N, x_h, x_w, C_IN]
    offsets,  # [E + 1]
    out,  # [parts, E, C_OUT, kh, KW, C_IN]
    parts, x_h, x_w,
    grad_stride_n, grad_stride_h, grad_stride_w, x_stride_n, x_stride_h, x_stride_w,
    out_stride_p, out_stride_e, out_stride_o, out_stride_h, out_stride_w,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, KW: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    o_blocks: tl.constexpr = (C_OUT + BLOCK_M - 1) // BLOCK_M
    c_blocks: tl.constexpr = (C_IN + BLOCK_N - 1) // BLOCK_N
    positions: tl.constexpr = OUT_H * OUT_W
    pid = tl.program_id(0)
    c = pid % c_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    o = pid // c_blocks % o_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    kh = pid // (c_blocks * o_blocks) // KW
    kw = pid // (c_blocks * o_blocks) % KW
    expert = tl.program_id(1) // parts
    part = tl.program_id(1) % parts
    in_c = (c < C_IN) | (C_IN % BLOCK_N == 0)
    in_o = (o < C_OUT) | (C_OUT % BLOCK_M == 0)

    begin = tl.load(offsets + expert)
    rows = (tl.load(offsets + expert + 1) - begin) * positions
    steps = tl.cdiv(tl.cdiv(rows, BLOCK_K), parts)
    first = part * steps * BLOCK_K
    last = tl.minimum(first + steps * BLOCK_K, rows)

    # Offsets within an image fit in 32 bits: channels_innermost() ensures that.
    x_tap = x + kh * x_stride_h + kw * x_stride_w
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        image = begin + row // positions
        i_h = row % positions // OUT_W
        i_w = row % OUT_W
        x_h0 = i_h * STRIDE_H - PAD_H
        x_w0 = i_w * STRIDE_W - PAD_W
        in_h = (x_h0 >= -kh) & (x_h0 < x_h - kh)
        in_w = (x_w0 >= -kw) & (x_w0 < x_w - kw)
        inside = ((row < last) & in_h & in_w)[:, None]
        grad_rows = grad + at(image, grad_stride_n) + i_h * grad_stride_h + i_w * grad_stride_w
        x_rows = x_tap + at(image, x_stride_n) + x_h0 * x_stride_h + x_w0 * x_stride_w
        a = tl.load(grad_rows[:, None] + o[None, :], mask=inside & in_o[None, :], other=0.0)  # [positions, O]
        b = tl.load(x_rows[:, None] + c[None, :], mask=inside & in_c[None, :], other=0.0)  # [positions, C]
        acc = dot(tl.trans(a), b, acc)

    out_rows = out + at(part, out_stride_p) + at(expert, out_stride_e) + at(o, out_stride_o)
    out_rows += kh * out_stride_h + kw * out_stride_w
    tl.store(out_rows[:, None] + c[None, :], acc.to(out.dtype.element_ty), in_o[:, None] & in_c[None, :])


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
    """Gradient of `expert_conv2d` with respect to its weight, bitwise repeatable.

    Args:
        grad: [N, O, H', W'].
        x: [N, C, H, W].
        offsets: int32 [E + 1].
        height: height of the convolution's kernel.
        width: its width.
        stride: (vertical, horizontal).
        padding: (vertical, horizontal).
        tile: None for the configured one.
        parts: number of parts that each expert's positions are summed in; None for enough to fill the device.

    Returns:
        [E, O, C, height, width]; zeros for an expert without images. The kernel reads and writes sixteen bytes of
        channels at a time, so an operand whose channels are not innermost in memory is copied.
    """
    shipped = tile or configs.choose(configs.EXPERT_CONV2D_WEIGHT_GRAD, x.device)[x.element_size()]
    num_experts, rows = offsets.shape[0] - 1, grad.shape[0] * grad.shape[2] * grad.shape[3]
    if parts is None:
        programs = num_experts * _num_tiles(grad, x, height, width, shipped)
        parts = max(1, min(PROGRAMS // programs, rows // (LEAST_ROWS * num_experts)))
    out = _empty_parts(parts, num_experts, grad, x, height, width)
    make = partial(_weight_grad, grad, x, offsets, out, stride, padding)
    make(tile or tuning.choose(make, shipped)).run()
    return (out[0] if parts == 1 else out.sum(0).to(x.dtype)).contiguous()


def _num_tiles(grad: Tensor, x: Tensor, height: int, width: int, tile: Tile) -> int:
    c_out, c_in = grad.shape[1], x.shape[1]
    return triton.cdiv(c_out, fit(tile.m, c_out)) * triton.cdiv(c_in, fit(tile.n, c_in)) * height * width


def _empty_parts(parts: int, num_experts: int, grad: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    dtype = x.dtype if parts == 1 else torch.float32
    out = x.new_empty(parts, num_experts, grad.shape[1], height, width, x.shape[1], dtype=dtype)
    return out.permute(0, 1, 2, 5, 3, 4)


def _weight_grad(
    grad: Tensor, x: Tensor, offsets: Tensor, out: Tensor, stride: Sequence[int], padding: Sequence[int], tile: Tile
) -> Launch:
    grad, x = channels_innermost(grad), channels_innermost(x)
    parts, num_experts, c_out, c_in, height, width = out.shape
    check_counts(grad.shape[0] * grad.shape[2] * grad.shape[3], grad, x, out[0])
    return Launch(
        _expert_conv2d_weight_grad_kernel,
        (_num_tiles(grad, x, height, width, tile), num_experts * parts),
        {
            "grad": grad,
            "x": x,
            "offsets": offsets,
            "out": out,
            "parts": parts,
            "x_h": x.shape[2],
            "x_w": x.shape[3],
            **strides("grad", grad[:, 0], "nhw"),
            **strides("x", x[:, 0], "nhw"),
            **strides("out", out[:, :, :, 0], "peohw"),
            "C_IN": c_in,
            "C_OUT": c_out,
            "KW": width,
            "OUT_H": grad.shape[2],
            "OUT_W": grad.shape[3],
            "STRIDE_H": stride[0],
            "STRIDE_W": stride[1],
            "PAD_H": padding[0],
            "PAD_W": padding[1],
            "BLOCK_M": fit(tile.m, c_out),
            "BLOCK_N": fit(tile.n, c_in),
            "BLOCK_K": tile.k,
        },
        tile.num_warps,
        tile.num_stages,
        tensor_cores=x.dtype != torch.float32,  # fp32 is not rounded to tf32
    )


def static_launches() -> Iterator[tuple[int | str, str, Launch]]:
    """(architecture in the table, name, launch on meta tensors) of every shipped configuration, to be compiled."""
    one = torch.empty(1, 1, 1, 1, device="meta")  # the compiler treats integers of value 1 as constants
    arguments = one, one, one.new_empty(2, dtype=torch.int32), one[None, None], (1, 1), (0, 0)
    yield 90, "expert_conv2d dW of ones", _weight_grad(*arguments, configs.EXPERT_CONV2D_WEIGHT_GRAD[90][4])
    num_images, experts, size = 512, 4, 16
    shapes = {torch.bfloat16: ((3, 64, 8), (64, 64, 8), (512, 512, 1)), torch.float32: ((64, 64, 8),)}
    for dtype, layers in shapes.items():
        like = torch.empty(0, dtype=dtype, device="meta")
        offsets = like.new_empty(experts + 1, dtype=torch.int32)
        for c_in, c_out, parts in layers:
            x = empty_images(like, num_images, c_in, size, size)
            grad = empty_images(like, num_images, c_out, size, size)
            out = _empty_parts(parts, experts, grad, x, 3, 3)
            for arch, by_bytes in configs.EXPERT_CONV2D_WEIGHT_GRAD.items():
                launch = _weight_grad(grad, x, offsets, out, (1, 1), (1, 1), by_bytes[x.element_size()])
                yield arch, f"expert_conv2d dW {dtype.itemsize * 8}-bit {c_in} to {c_out}", launch
