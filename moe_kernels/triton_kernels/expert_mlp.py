"""Backward through an expert MLP's activation, recomputed from the saved pre-activation z, in one pass over the slots.

With A = act(z), gate weights S and dA' = dO W2 (not yet scaled by S): dS = <dA', A>, dz = S dA' act'(z), and S A, which
dW2 = dO^T (S A) needs.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.triton_kernels.activations import ACTIVATIONS, GATED, activate, activation_grad
from moe_kernels.triton_kernels.launch import Launch


@triton.jit
def _expert_mlp_hidden_grad_kernel(
    da,  # [N, n]
    z,  # [N, n], or [N, 2 n] where GATED
    gates,  # [N] fp32
    dz,  # like z, or None
    weighted_a,  # [N, n] or None
    dgates,  # [N] fp32, or None
    num_rows, n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < num_rows
    s = tl.load(gates + row, mask=real, other=0.0)[:, None]
    wide = row.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for col in range(0, n, BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)[None, :]
        mask = real[:, None] & (cols < n)
        g = tl.load(da + wide * n + cols, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            z1 = tl.load(z + wide * 2 * n + cols, mask=mask, other=0.0).to(tl.float32)
            z2 = tl.load(z + wide * 2 * n + n + cols, mask=mask, other=0.0).to(tl.float32)
            a1 = activate(z1, ACTIVATION)
            a = a1 * z2
            if dz is not None:
                dz1 = s * g * activation_grad(z1, ACTIVATION) * z2
                tl.store(dz + wide * 2 * n + cols, dz1.to(dz.dtype.element_ty), mask=mask)
                tl.store(dz + wide * 2 * n + n + cols, (s * g * a1).to(dz.dtype.element_ty), mask=mask)
        else:
            z1 = tl.load(z + wide * n + cols, mask=mask, other=0.0).to(tl.float32)
            a = activate(z1, ACTIVATION)
            if dz is not None:
                dz1 = s * g * activation_grad(z1, ACTIVATION)
                tl.store(dz + wide * n + cols, dz1.to(dz.dtype.element_ty), mask=mask)
        a = a.to(da.dtype.element_ty).to(tl.float32)  # as the forward rounded it
        total += g * a
        if weighted_a is not None:
            tl.store(weighted_a + wide * n + cols, (s * a).to(weighted_a.dtype.element_ty), mask=mask)
    if dgates is not None:
        tl.store(dgates + row, tl.sum(total, 1), mask=real)


def expert_mlp_hidden_grad(
    da: Tensor,
    z: Tensor,
    gates: Tensor,
    activation: str,
    z_needs: bool = True,
    weight_needs: bool = True,
    gates_needs: bool = True,
    *,
    block: tuple[int, int] = (4, 512),
) -> tuple[Tensor, ...]:
    """Gradients at the hidden layer of an expert MLP.

    Args:
        da: [N, n], the gradient of the hidden activation before the gate weight: dO[row] @ W2.
        z: [N, n], or [N, 2 n] of a gated activation: the saved pre-activation.
        gates: fp32 [N], the gate weight of each row.
        activation: one of `activations.ACTIVATIONS`.
        z_needs, weight_needs, gates_needs: which of the results are computed; the others are empty.
        block: (rows, columns) that a program processes at a time.

    Returns:
        dz like z, the weighted activation [N, n], and the gates' gradient fp32 [N]. If the second linear map has a
        bias, the caller adds <dO[row], bias[e]> to the last.
    """
    da, z, gates = da.contiguous(), z.contiguous(), gates.contiguous()
    pairs = ((z, z_needs), (da, weight_needs), (gates, gates_needs))
    wanted = [torch.empty_like(like) if needs else None for like, needs in pairs]
    if da.numel() > 0:
        hidden_grad_launch(da, z, gates, activation, wanted, block).run()
    elif wanted[2] is not None:
        wanted[2].zero_()
    return tuple(
        like.new_empty(0) if result is None else result for (like, _), result in zip(pairs, wanted, strict=True)
    )


def hidden_grad_launch(
    da: Tensor,
    z: Tensor,
    gates: Tensor,
    activation: str,
    results: list[Tensor | None],
    block: tuple[int, int],
) -> Launch:
    num_rows, n = da.shape
    assert activation in ACTIVATIONS, activation
    assert all(t is None or t.is_contiguous() for t in (da, z, gates, *results))
    assert z.shape == (num_rows, n * (2 if activation in GATED else 1)) and gates.dtype == torch.float32
    block_m, block_n = block[0], min(block[1], triton.next_power_of_2(n))
    return Launch(
        _expert_mlp_hidden_grad_kernel,
        (triton.cdiv(num_rows, block_m),),
        {
            "da": da,
            "z": z,
            "gates": gates,
            "dz": results[0],
            "weighted_a": results[1],
            "dgates": results[2],
            "num_rows": num_rows,
            "n": n,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "ACTIVATION": GATED.get(activation, activation),
            "GATED": activation in GATED,
        },
        num_warps=4,
    )


def static_launches() -> Iterator[tuple[int | str, str, Launch]]:
    """(architecture, name, launch on meta tensors) of the only configuration, to be compiled."""
    one = torch.empty(1, 1, device="meta")  # the compiler treats integers of value 1 as constants
    of_ones = hidden_grad_launch(one, one, one[0], "relu", [one, one, one[0]], (4, 512))
    yield 90, "expert_mlp hidden grad of ones", of_ones
    for activation in ("gelu", "geglu"):
        da = torch.empty(8192, 1024, dtype=torch.bfloat16, device="meta")
        z = da.new_empty(8192, 2048 if activation in GATED else 1024)
        gates = da.new_empty(8192, dtype=torch.float32)
        launch = hidden_grad_launch(da, z, gates, activation, [z, da, gates], (4, 512))
        for arch in (80, 90, 100, "default"):
            yield arch, f"expert_mlp hidden grad {activation}", launch
