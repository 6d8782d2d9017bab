"""The files of a run, each written whole or not at all."""

import contextlib
import csv
import dataclasses
import fcntl
import io
import json
import os
import re
from collections.abc import Iterator
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
        with _naming(path):
            with unfinished.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the path to an error that has none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    write_atomic(path, safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()}, metadata))


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


@contextlib.contextmanager
def open_run(out: Path, config: Config, resume: bool) -> Iterator[None]:
    """Makes the folder of a run and its config.json or, with `resume`, takes what is there; holds it for this process.

    Raises:
        UserError: if the folder holds something else, or a run with other settings, or is in use.
    """
    holds_run = (out / "config.json").exists()
    if holds_run and not resume:
        raise UserError(
            f"--out {out} already holds a run: give another folder, remove it, or go on with it by --resume"
        )
    if not holds_run and out.exists() and not (out.is_dir() and set(out.iterdir()) == _unfinished(out)):
        raise UserError(
            f"--out {out} already exists and is not an empty folder: give another folder, or remove it first"
        )
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        _lock(folder, out)
        for path in _unfinished(out):
            path.unlink()
        if holds_run:
            _demand_equal(config, run_config(out), out)
        if not holds_run or run_config(out) != config:
            write_atomic(out / "config.json", config.to_json())
        yield
    finally:
        os.close(folder)


def _lock(folder: int, out: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
    except BlockingIOError:
        raise UserError(f"--out {out} is in use by another process that trains") from None


def _unfinished(out: Path) -> set[Path]:
    """What write_atomic was writing when its process was killed."""
    return {path for path in out.iterdir() if re.fullmatch(r"\..+\.\d+", path.name)}


def _demand_equal(config: Config, before: Config, out: Path) -> None:
    for field in dataclasses.fields(config):
        new, old = getattr(config, field.name), getattr(before, field.name)
        if new != old and field.name != "data_dir":
            raise UserError(f"{field.name} must stay {old} for the run in {out}, got {new}: give another folder")


def run_config(run: Path) -> Config:
    if not (run / "config.json").exists():
        raise UserError(f"RUN must be a folder made by `rter train`, and {run} holds no config.json")
    return load_config(run / "config.json")


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def read_report(run: Path) -> dict[str, Any]:
    try:
        return read_json(run / "report.json")
    except FileNotFoundError:
        raise UserError(f"{run} holds no report.json: run `rter evaluate {run}` first") from None


def append_line(path: Path, record: dict[str, Any]) -> None:
    with _naming(path), path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def keep_lines(path: Path, count: int) -> None:
    """Cuts the file back to its first `count` lines; what follows, a torn line perhaps, is done again."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if len(lines) < count:
        raise UserError(f"{path} is damaged: it holds {len(lines)} lines where the run's state says {count}")
    if len(lines) > count:
        write_atomic(path, b"".join(lines[:count]))


def write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for record in records for name in record)))
    table.writeheader()
    table.writerows(records)
    write_atomic(path, text.getvalue())
