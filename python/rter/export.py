"""Exports what `rter evaluate` needs of a trained run: its settings, its metrics, and its weights in 16 bits."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rter.checkpoint import load_tensors, run_config, save_tensors, write_atomic
from rter.errors import UserError


def export(run: Path, weights: str, out: Path) -> Path:
    """Writes a folder that `rter evaluate` accepts as a run; returns the path of the weights in it.

    Floating-point weights are rounded to fp16; the rounded values are evaluated in fp32. The settings name no folder of
    this machine: of `init` only the file's name is kept, and --data-dir must say where the data are.

    Args:
        run: folder of the run.
        weights: "last" or "best".
        out: folder to make.

    Raises:
        UserError: if there is no such run, if the folder exists, or if a weight is beyond fp16's range.
    """
    config = run_config(run, "data")
    config = replace(config, init=Path(config.init).name)
    file = f"{weights}.safetensors"
    rounded = {name: _half(run / file, name, tensor) for name, tensor in load_tensors(run / file).items()}
    metrics = (run / "metrics.jsonl").read_bytes()
    if out.exists():
        raise UserError(f"--out {out} already exists: give another folder, or remove it first")
    out.mkdir(parents=True)
    write_atomic(out / "config.json", config.to_json())
    write_atomic(out / "metrics.jsonl", metrics)
    save_tensors(out / file, rounded)
    return out / file


def _half(file: Path, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if not torch.equal(half.isfinite(), tensor.isfinite()):
        raise UserError(f"{file}: {name} must be within fp16's range of 65504, got {tensor.abs().max().item():.4g}")
    return half
