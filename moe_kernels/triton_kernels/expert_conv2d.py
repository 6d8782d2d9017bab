"""Grouped 2-D convolution and its input gradient: one implicit GEMM over channels-last images.

Rows are (image, y, x), columns are output channels, and the sum runs over (kh, kw, channel). The input gradient is the
same sum over the output gradient with the taps reversed, for one residue of (y, x) modulo the stride at a time.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels._layout import channels_innermost, memory_format
from moe_kernels.triton_kernels import configs, tuning
from moe_kernels.triton_kernels.configs import Tile
from moe_kernels.triton_kernels.launch import Launch, strides
from moe_kernels.triton_kernels.tiles import at, dot, max_tiles


@triton.jit
def _find_tile(offsets, tile, positions, num_experts, BLOCK: tl.constexpr):
    """(expert, index of the tile among the expert's) by binary search, for images of `positions` rows each.

    Expert e's tiles begin at offsets[e] * positions // BLOCK + e, which needs no scan over the experts and leaves
    every expert enough tiles for its rows.
    """
    low = 0
    high = num_experts - 1
    while low < high:
        middle = (low + high + 1) // 2
        reached = tl.load(offsets + middle) * positions // BLOCK + middle <= tile
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return low, tile - tl.load(offsets + low) * positions // BLOCK - low


@triton.jit
def _expert_conv2d_kernel(
    x,  # [N, x_h, x_w, C_IN]
    weight,  # [E, C_OUT, C_IN, KH, KW]
    bias,  # [E, C_OUT] or None
    offsets,  # [E + 1]
    out,  # [N, out_h, out_w, C_OUT]
    num_experts, x_h, x_w, out_h, out_w,
    x_stride_n, x_stride_h, x_stride_w, w_stride_e, w_stride_o, w_stride_c, w_stride_h, w_stride_w,
    b_stride_e, b_stride_o, out_stride_n, out_stride_h, out_stride_w,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    TRANSPOSED: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    o_blocks: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    c_blocks: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K

    # Output i of this program lies at phase + step * i; tap first + step * j joins it to x at start + sign * j.
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

    expert, tile = _find_tile(offsets, tl.program_id(0) // o_blocks, positions, num_experts, BLOCK_M)
    begin = tl.load(offsets + expert)
    rows = (tl.load(offsets + expert + 1) - begin) * positions
    if tile * BLOCK_M >= rows:
        return

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    image = begin + row // positions
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
    # Offsets within an image, and within an expert's weight, fit in 32 bits: channels_innermost() ensures that.
    x_tile = (x + at(image, x_stride_n) + start_h * x_stride_h + start_w * x_stride_w)[:, None] + c[None, :]
    weight_tile = weight + at(expert, w_stride_e) + first_h * w_stride_h + first_w * w_stride_w
    weight_tile += c[:, None] * w_stride_c + o[None, :] * w_stride_o
    in_o = (o < C_OUT) | (C_OUT % BLOCK_N == 0)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(taps_h * taps_w * c_blocks):
        c0 = k % c_blocks * BLOCK_K
        j_h = k // c_blocks // taps_w
        j_w = k // c_blocks % taps_w
        x_row = start_h + sign * j_h
        x_col = start_w + sign * j_w
        in_x = ((x_row >= 0) & (x_row < x_h) & (x_col >= 0) & (x_col < x_w))[:, None]
        in_weight = in_o[None, :]
        if C_IN % BLOCK_K != 0:
            in_x &= (c < C_IN - c0)[None, :]
            in_weight &= (c < C_IN - c0)[:, None]
        a = tl.load(x_tile + (sign * (j_h * x_stride_h + j_w * x_stride_w) + c0), mask=in_x, other=0.0)
        tap = step_h * j_h * w_stride_h + step_w * j_w * w_stride_w
        b = tl.load(weight_tile + (tap + c0 * w_stride_c), mask=in_weight, other=0.0)
        acc = dot(a, b, acc)

    if bias is not None:
        shift = tl.load(bias + at(expert, b_stride_e) + at(o, b_stride_o), mask=in_o, other=0.0)
        acc += shift.to(tl.float32)[None, :]
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    out_rows = out + at(image, out_stride_n)
    out_rows += (phase_h + step_h * i_h) * out_stride_h + (phase_w + step_w * i_w) * out_stride_w
    out_mask = (row < rows)[:, None] & in_o[None, :]
    tl.store(out_rows[:, None] + o[None, :], acc.to(out.dtype.element_ty), mask=out_mask)


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
    """For image j of expert e: conv2d(x[j], weight[e]) + bias[e], followed by a ReLU if `relu`.

    Args:
        x: [N, C, H, W].
        weight: [E, O, C, kh, kw].
        bias: [E, O] or None.
        offsets: int32 [E + 1].
        stride: (vertical, horizontal).
        padding: (vertical, horizontal).
        relu: whether negative outputs become zero.
        tile: None for the configured one.

    Returns:
        [N, O, H', W'] in x's memory format. The kernel reads and writes sixteen bytes of channels at a time, so an
        operand whose channels are not innermost in memory is copied.
    """
    size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], padding, weight.shape[3:], stride, strict=True)]
    out = empty_images(x, x.shape[0], weight.shape[1], *size)
    if out.numel() > 0:
        make = partial(_conv2d, x, weight, bias, offsets, out, stride, padding, relu=relu)
        make(tile or tuning.choose(make, configs.choose(configs.EXPERT_CONV2D, x.device)[x.element_size()])).run()
    return out.contiguous(memory_format=memory_format(x))


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
    """Gradient of `expert_conv2d` with respect to its images: grad [N, O, H', W'] -> [N, C, height, width]."""
    out = empty_images(grad, grad.shape[0], weight.shape[2], height, width)
    if out.numel() > 0:
        make = partial(_conv2d, grad, weight, None, offsets, out, stride, padding, transposed=True)
        make(tile or tuning.choose(make, configs.choose(configs.EXPERT_CONV2D, grad.device)[grad.element_size()])).run()
    return out.contiguous(memory_format=memory_format(grad))


def empty_images(like: Tensor, *shape: int) -> Tensor:
    """Uninitialized images in channels-last memory."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def check_counts(rows: int, *operands: Tensor) -> None:
    """Raises ValueError if 32-bit indices cannot count the positions of all images, or one item's elements."""
    if max(rows, *(x.shape[1:].numel() for x in operands)) >= 2**31:
        shapes = ", ".join(str(list(x.shape)) for x in operands)
        raise ValueError(
            "a convolution must have fewer than 2^31 positions in all images together, and fewer than 2^31 elements "
            f"per image and per expert's weight, got {shapes}"
        )


def fit(block: int, size: int) -> int:
    """The block, cut down to the power of two that covers `size`, but to no less than the 16 that tl.dot needs."""
    return max(16, min(block, triton.next_power_of_2(size)))


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    out: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    tile: Tile,
    *,
    transposed: bool = False,
    relu: bool = False,
) -> Launch:
    x, weight = channels_innermost(x), channels_innermost(weight)
    if transposed:
        weight = weight.transpose(1, 2)
    num_experts, c_out, c_in, kh, kw = weight.shape
    block_n, block_k = fit(tile.n, c_out), fit(tile.k, c_in)
    phases = stride if transposed else (1, 1)
    rows = out.shape[0] * triton.cdiv(out.shape[2], phases[0]) * triton.cdiv(out.shape[3], phases[1])
    check_counts(rows, x, out, weight)
    return Launch(
        _expert_conv2d_kernel,
        (max_tiles(rows, num_experts, tile.m) * triton.cdiv(c_out, block_n), phases[0] * phases[1]),
        {
            "x": x,
            "weight": weight,
            "bias": bias,
            "offsets": offsets,
            "out": out,
            "num_experts": num_experts,
            "x_h": x.shape[2],
            "x_w": x.shape[3],
            "out_h": out.shape[2],
            "out_w": out.shape[3],
            **strides("x", x[:, 0], "nhw"),
            **strides("w", weight, "eochw"),
            **strides("b", bias, "eo"),
            **strides("out", out[:, 0], "nhw"),
            "C_IN": c_in,
            "C_OUT": c_out,
            "KH": kh,
            "KW": kw,
            "STRIDE_H": stride[0],
            "STRIDE_W": stride[1],
            "PAD_H": padding[0],
            "PAD_W": padding[1],
            "TRANSPOSED": transposed,
            "RELU": relu,
            "BLOCK_M": tile.m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        },
        tile.num_warps,
        tile.num_stages,
        tensor_cores=x.dtype != torch.float32,  # fp32 is not rounded to tf32
    )


def static_launches() -> Iterator[tuple[int | str, str, Launch]]:
    """(architecture in the table, name, launch on meta tensors) of every shipped configuration, to be compiled."""
    one = torch.empty(1, 1, 1, 1, 1, device="meta")  # the compiler treats integers of value 1 as constants
    for transposed in (False, True):
        arguments = one[0], one, one[0, 0, 0], one.new_empty(2, dtype=torch.int32), one[0], (1, 1), (0, 0)
        launch = _conv2d(*arguments, configs.EXPERT_CONV2D[90][4], transposed=transposed)
        yield 90, f"expert_conv2d {'dX' if transposed else 'forward'} of ones", launch
    num_images, experts, size, padding = 512, 4, 16, (1, 1)
    shapes = {torch.bfloat16: ((3, 64, 1), (64, 64, 1), (128, 256, 2), (512, 512, 1)), torch.float32: ((64, 64, 1),)}
    for dtype, layers in shapes.items():
        offsets = torch.empty(experts + 1, dtype=torch.int32, device="meta")
        for c_in, c_out, step in layers:
            weight = torch.empty(experts, c_out, c_in, 3, 3, dtype=dtype, device="meta")  # as in ExpertConv2d
            bias = weight.new_empty(experts, c_out)
            x = empty_images(weight, num_images, c_in, size, size)
            out = empty_images(weight, num_images, c_out, size // step, size // step)
            stride = (step, step)
            for arch, by_bytes in configs.EXPERT_CONV2D.items():
                tile = by_bytes[x.element_size()]
                shown = f"{dtype.itemsize * 8}-bit {c_in} to {c_out} stride {step}"
                forward = _conv2d(x, weight, bias, offsets, out, stride, padding, tile, relu=True)
                yield arch, f"expert_conv2d forward {shown}", forward
                adjoint = _conv2d(out, weight, None, offsets, x, stride, padding, tile, transposed=True)
                yield arch, f"expert_conv2d dX {shown}", adjoint
