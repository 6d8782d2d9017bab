"""The files of a run, each written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rter.config import Config, load_config
from rter.errors import UserError


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replaces the file at once: a reader, or a crash, sees the old content or the new one."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    write_atomic(path, safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def save_weights(path: Path, model: nn.Module) -> None:
    save_tensors(path, model.state_dict())


def load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: did the command that writes it run to its end?") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def load_weights(path: Path, model: nn.Module) -> None:
    try:
        model.load_state_dict(load_tensors(path))
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the run's config.json: {' '.join(str(error).split())}") from None


def create_run(out: Path, config: Config) -> None:
    """Makes the folder of a new run and writes its config.json."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "already holds a run" if (out / "config.json").exists() else "already exists and is not an empty folder"
        raise UserError(f"--out {out} {what}: give another folder, or remove it first")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "config.json", config.to_json())


def run_config(run: Path) -> Config:
    if not (run / "config.json").exists():
        raise UserError(f"RUN must be a folder made by `rter train`, and {run} holds no config.json")
    return load_config(run / "config.json")


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def read_report(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / "report.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{run} holds no report.json: run `rter evaluate {run}` first") from None


def append_line(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
