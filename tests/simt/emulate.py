"""The operators on emulated CUDA blocks: each function takes an operator's arguments and runs its driver."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from simt import build
from torch import Tensor

from moe_kernels._layout import memory_format

__all__ = [  # those whose arguments and results are the operator's
    "combine",
    "combine_input_grad",
    "combine_weight_grad",
    "expert_batch_norm_forward",
    "expert_batch_norm_input_grad",
    "expert_batch_norm_param_grad",
    "expert_sum",
    "group_by_expert",
    "index_sum",
    "kl_divergence",
    "kl_divergence_backward",
    "mask_relu_backward",
    "mask_relu_forward",
    "topk_route",
    "topk_route_backward",
]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def storage(x: Tensor) -> Tensor:
    """The bytes of x: in memory order if it is channels-last, else row by row."""
    dense = (
        x.detach() if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else x.detach().contiguous()
    )
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def drive(driver: str, inputs: dict[str, Tensor | None], outputs: dict[str, Tensor], *arguments: Any) -> Any:
    """Runs a driver on the inputs and returns its outputs, with the shapes, layouts and dtypes of `outputs`."""
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


def _pgd_step(
    outputs: dict[str, Tensor],
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    eps: Any,
    alpha: Any,
    norm: str,
    bounds: tuple[float, float] = (0.0, 1.0),
    mean: Tensor | None = None,
    std: Tensor | None = None,
    *,
    shift: int = 0,
) -> Tensor:
    layout = memory_format(x_adv)
    x_adv, grad, x = (t.contiguous(memory_format=layout) for t in (x_adv, grad, x))
    eps, alpha = (torch.as_tensor(r, dtype=x.dtype).reshape(-1) for r in (eps, alpha))
    inputs = {"x_adv": x_adv, "grad": grad, "x": x, "eps": eps, "alpha": alpha, "mean": mean, "std": std}
    sizes = (x.shape[0], x[0].numel() if len(x) else 0)
    inner = 1 if layout == torch.channels_last else x.shape[2:].numel()
    return drive("pgd_step_", inputs, outputs, name(x.dtype), name(grad.dtype), *sizes, shift, norm, *bounds, inner)


def pgd_step_(x_adv: Tensor, *args: Any, shift: int = 0) -> Tensor:
    out = torch.empty_like(x_adv, memory_format=memory_format(x_adv))
    return _pgd_step({"out": out}, x_adv, *args, shift=shift)


def pgd_step_normalized_(x_adv: Tensor, grad: Tensor, *args: Any, shift: int = 0) -> Tensor:
    out = torch.empty_like(x_adv, dtype=grad.dtype, memory_format=memory_format(x_adv))
    return _pgd_step({"model_input": out}, x_adv, grad, *args, shift=shift)


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


def _bounds(low: float, high: float | None, slope: float | None) -> list[Any]:
    return [low, *("none" if value is None else value for value in (high, slope))]


def mask_relu_forward(
    x: Tensor, low: float = 0, high: float | None = None, slope: float | None = None, *, shift: int = 0
) -> tuple[Tensor, Tensor]:
    x = x.contiguous(memory_format=memory_format(x))
    outputs = {"y": torch.empty_like(x), "bits": x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)}
    rectifier = _bounds(low, high, slope)
    return drive("mask_relu", {"x": x}, outputs, "mask_relu_forward", name(x.dtype), x.numel(), shift, *rectifier)


def mask_relu_backward(
    grad: Tensor, bits: Tensor, channels_last: bool, slope: float | None = None, *, shift: int = 0
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    inputs = {"grad": grad.contiguous(memory_format=layout), "bits": bits}
    outputs = {"out": torch.empty_like(inputs["grad"])}
    rectifier = _bounds(0, None, slope)
    return drive("mask_relu", inputs, outputs, "mask_relu_backward", name(grad.dtype), grad.numel(), shift, *rectifier)


def topk_route(logits: Tensor, k: int, gate: str = "softmax", renormalize: bool = True) -> tuple[Tensor, Tensor]:
    rows, num_experts = logits.shape
    outputs = {
        "weights": logits.new_empty(rows, k, dtype=wide(logits.dtype)),
        "experts": logits.new_empty(rows, k, dtype=torch.int32),
    }
    arguments = "topk_route", name(logits.dtype), rows, num_experts, k, gate, int(renormalize)
    return drive("topk_route", {"logits": logits}, outputs, *arguments)


def topk_route_backward(grad: Tensor, logits: Tensor, experts: Tensor, gate: str, renormalize: bool) -> Tensor:
    inputs, outputs = {"grad": grad, "logits": logits, "experts": experts}, {"out": logits.new_empty(logits.shape)}
    arguments = "topk_route_backward", name(logits.dtype), *logits.shape, experts.shape[1], gate, int(renormalize)
    return drive("topk_route", inputs, outputs, *arguments)


def group_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = {"order": (experts.numel(),), "position": experts.shape, "offsets": (num_experts + 1,)}
    outputs = {array: torch.empty(shape, dtype=torch.int32) for array, shape in shapes.items()}
    return drive("group_by_expert", {"experts": experts}, outputs, name(experts.dtype), num_experts)


def kl_divergence(clean: Tensor, adv: Tensor) -> Tensor:
    outputs = {"out": clean.new_empty(clean.shape[0], dtype=wide(clean.dtype))}
    return drive(
        "kl_divergence", {"clean": clean, "adv": adv}, outputs, "kl_divergence", name(clean.dtype), *clean.shape
    )


def kl_divergence_backward(
    grad: Tensor, clean: Tensor, adv: Tensor, clean_needs: bool, adv_needs: bool
) -> tuple[Tensor, Tensor]:
    outputs = {
        "dclean": clean.new_empty(clean.shape if clean_needs else (0,)),
        "dadv": adv.new_empty(adv.shape if adv_needs else (0,)),
    }
    inputs = {"grad": grad, "clean": clean, "adv": adv}
    arguments = name(clean.dtype), *clean.shape, int(clean_needs), int(adv_needs)
    return drive("kl_divergence", inputs, outputs, "kl_divergence_backward", *arguments)


def expert_sum(x: Tensor, offsets: Tensor) -> Tensor:
    outputs = {"out": x.new_empty(len(offsets) - 1, x.shape[1])}
    arguments = "expert_sum", name(x.dtype), x.shape[0], len(offsets) - 1, x.shape[1]
    return drive("expert_sum", {"x": x, "offsets": offsets}, outputs, *arguments)


def index_sum(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    outputs = {"out": x.new_empty(num_rows, x.shape[1])}
    return drive(
        "expert_sum", {"x": x, "index": index}, outputs, "index_sum", name(x.dtype), len(x), num_rows, x.shape[1]
    )


def _batch_norm(op: str, row: Tensor, offsets: Tensor, eps: float, training: bool, **inputs: Tensor | None) -> Any:
    """One part of batch normalisation; an argument that is None has no file."""
    layout, images, channels = memory_format(row), *row.shape[:2]
    arrays: dict[str, Tensor | None] = {"offsets": offsets}
    for array, x in inputs.items():
        is_table = array not in ("x", "grad")
        arrays[array] = None if x is None else x.to(wide(row.dtype)) if is_table else x.contiguous(memory_format=layout)
    table = row.new_empty(len(offsets) - 1, channels, dtype=wide(row.dtype))
    kept = {"forward": ("y", "first", "second"), "param_grad": ("first", "second"), "input_grad": ("y",)}[op]
    outputs = {"y": torch.empty_like(row, memory_format=layout), "first": table, "second": table.clone()}
    pixels = row.shape[2:].numel() if row.numel() else 0
    by_pixel = layout == torch.channels_last or pixels <= 1
    sizes = images, channels, pixels, len(offsets) - 1, int(by_pixel)
    outputs = {array: outputs[array] for array in kept}
    return drive("expert_batch_norm", arrays, outputs, op, name(row.dtype), *sizes, int(training), eps)


def expert_batch_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    offsets: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _batch_norm("forward", x, offsets, eps, training, x=x, weight=weight, bias=bias, mean=mean, var=var)


def expert_batch_norm_param_grad(
    grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, offsets: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _batch_norm("param_grad", grad, offsets, eps, True, grad=grad, x=x, mean=mean, var=var)


def expert_batch_norm_input_grad(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    mean: Tensor | None,
    var: Tensor,
    dbias: Tensor | None,
    dweight: Tensor | None,
    offsets: Tensor,
    eps: float,
) -> Tensor:
    tables = {"weight": weight, "mean": mean, "var": var, "dbias": dbias, "dweight": dweight}
    return _batch_norm("input_grad", grad, offsets, eps, True, grad=grad, x=x, **tables)
