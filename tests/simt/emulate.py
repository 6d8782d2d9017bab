"""The operators on emulated CUDA blocks: each function takes an operator's arguments and runs its driver."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_kernels._library import memory_format
from simt import build


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def storage(x: Tensor) -> Tensor:
    """The bytes of x in the order of its memory if it is channels-last, else row by row."""
    dense = x.detach() if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else x.detach().contiguous()
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def drive(driver: str, inputs: dict[str, Tensor | None], outputs: dict[str, Tensor], *arguments: Any) -> Any:
    """Runs a driver on the inputs and returns its outputs, of the shapes, layouts and dtypes of `outputs`."""
    with tempfile.TemporaryDirectory() as folder:
        for array, x in inputs.items():
            if x is not None:
                storage(x).numpy().tofile(f"{folder}/{array}")
        done = build.run(driver, folder, *arguments)
        assert done.returncode == 0, done.stderr
        for array, like in outputs.items():
            storage(like).copy_(torch.from_numpy(np.fromfile(Path(folder) / array, np.uint8)))
    results = tuple(outputs.values())
    return results[0] if len(results) == 1 else results


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def pgd_step_(x_adv: Tensor, grad: Tensor, x: Tensor, eps: Any, alpha: Any, norm: str, *, shift: int = 0) -> Tensor:
    eps, alpha = (torch.as_tensor(r, dtype=x.dtype).reshape(-1) for r in (eps, alpha))
    x_adv, grad, x = (t.contiguous() for t in (x_adv, grad, x))
    inputs = {"x_adv": x_adv, "grad": grad, "x": x, "eps": eps, "alpha": alpha}
    sizes = (x.shape[0], x[0].numel() if len(x) else 0)
    arguments = name(x.dtype), name(grad.dtype), *sizes, shift, norm, 0.0, 1.0
    return drive("pgd_step_", inputs, {"out": torch.empty_like(x)}, *arguments)


def _combine(op: str, inputs: dict[str, Tensor], row: Tensor, position: Tensor, out: Tensor, shift: int) -> Tensor:
    arrays = {array: x.contiguous() for array, x in inputs.items()}
    return drive(
        "combine",
        {"position": position, **arrays},
        {"out": out},
        *(op, name(row.dtype), *position.shape, row.shape[1:].numel(), shift),
    )


def combine(y: Tensor, weights: Tensor, position: Tensor, *, shift: int = 0) -> Tensor:
    inputs = {"y": y, "weights": weights.to(wide(y.dtype))}
    return _combine("combine", inputs, y, position, y.new_empty(position.shape[0], *y.shape[1:]), shift)


def combine_input_grad(grad: Tensor, weights: Tensor, position: Tensor, *, shift: int = 0) -> Tensor:
    inputs = {"grad": grad, "weights": weights.to(wide(grad.dtype))}
    out = grad.new_empty(position.numel(), *grad.shape[1:])
    return _combine("combine_input_grad", inputs, grad, position, out, shift)


def combine_weight_grad(grad: Tensor, y: Tensor, position: Tensor, *, shift: int = 0) -> Tensor:
    out = y.new_empty(position.shape, dtype=wide(y.dtype))
    return _combine("combine_weight_grad", {"grad": grad, "y": y}, y, position, out, shift)


def mask_relu_forward(x: Tensor, *, shift: int = 0) -> tuple[Tensor, Tensor]:
    x = x.contiguous(memory_format=memory_format(x))
    outputs = {"y": torch.empty_like(x), "bits": x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)}
    return drive("mask_relu", {"x": x}, outputs, "mask_relu_forward", name(x.dtype), x.numel(), shift)


def mask_relu_backward(grad: Tensor, bits: Tensor, channels_last: bool, *, shift: int = 0) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    inputs = {"grad": grad.contiguous(memory_format=layout), "bits": bits}
    outputs = {"out": torch.empty_like(inputs["grad"])}
    return drive("mask_relu", inputs, outputs, "mask_relu_backward", name(grad.dtype), grad.numel(), shift)
