"""Exports what `rter evaluate` needs of a trained run: its settings, its metrics, and its weights in 16 bits."""

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rter.checkpoint import load_tensors, run_config, save_tensors, write_atomic
from rter.config import Config
from rter.errors import UserError
from rter.settings import make_config

OF_ONE = {"init", "recompute", "dual_alpha", "dual_mix"}  # settings in which the parts of a dual model may differ


def export(
    run: Path,
    weights: str,
    out: Path,
    *,
    standard: Path | None = None,
    dual_alpha: float | None = None,
    dual_mix: str | None = None,
) -> Path:
    """Writes a folder that `rter evaluate` accepts as a run; returns the path of the weights in it.

    Floating-point weights are rounded to fp16; the rounded values are evaluated in fp32. The settings name no folder of
    this machine: of `init` only the file's name is kept, and --data-dir must say where the data are.

    Args:
        run: folder of the run.
        weights: "last" or "best".
        out: folder to make.
        standard: another run, whose model becomes F_S of a dual model, with that of `run` as F_R; None for no dual one.
        dual_alpha: the weight of F_R; None for that of `run`'s settings.
        dual_mix: what is mixed, "logits" or "probabilities"; None likewise.

    Raises:
        UserError: if there is no such run, if the folder exists, if a weight is beyond fp16's range, or if the two runs
            have not the same images to train on and the same network, or are no parts of a dual model.
    """
    config = run_config(run, "data")
    file = f"{weights}.safetensors"
    rounded = {name: _half(run / file, name, tensor) for name, tensor in load_tensors(run / file).items()}
    if standard:
        mixing = {"dual_alpha": dual_alpha, "dual_mix": dual_mix}
        config = _dual(config, run_config(standard, "data"), {k: v for k, v in mixing.items() if v is not None})
        for name, tensor in load_tensors(standard / file).items():
            rounded[f"standard.{name}"] = _half(standard / file, name, tensor)
    config = replace(config, init=Path(config.init).name)
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


def _dual(robust: Config, standard: Config, mixing: dict[str, Any]) -> Config:
    """The settings of the dual model of two runs; `mixing` is in place of those of the robust one."""
    for config in (robust, standard):
        if config.dual:
            raise UserError(f"a dual model must be made of runs with one model each, got one of method {config.method}")
    of_both = [f.name for f in fields(Config) if f.metadata["group"] == "model" and f.name not in OF_ONE]
    # With another seed or number of held-out images one part may be tested on what the other has seen in training.
    for name in ("data", "image_size", "seed", "held_out", *of_both):
        values = getattr(robust, name), getattr(standard, name)
        if values[0] != values[1]:
            raise UserError(f"--standard must be a run with the {name} of RUN, {values[0]!r}, got {values[1]!r}")
    dual = replace(robust, method="dual", **mixing)
    if not 0 <= dual.dual_alpha <= 1:
        raise UserError(f"--dual-alpha must be between 0 and 1, got {dual.dual_alpha}")
    return make_config(**asdict(dual))
