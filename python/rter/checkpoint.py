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

from rter.config import Config
from rter.console import say
from rter.data.files import damaged
from rter.errors import UserError
from rter.settings import ABSOLUTE, RESUME, load_config

NUMBER, OPTIONAL = (int, float), (int, float, type(None))
NAMES = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
NAMES |= {type(None): "null"}
METRICS = {"epoch": int, "loss": NUMBER, "seconds": NUMBER}
REPORT: dict[Any, Any] = {  # what every report.json holds, at least
    **dict.fromkeys(("method", "norm", "split", "suite", "worst_attack"), str),
    **dict.fromkeys(("data", "weights"), (str, type(None))),
    **dict.fromkeys(("seed", "num_experts", "epochs", "held_out"), int),
    **dict.fromkeys(
        ("eps", "train_seconds", "sa", "ra", "verdict", "route_flip_rate", "route_flip_rate_whole"), NUMBER
    ),
    **dict.fromkeys(("ra_r", "aa", "train_seconds"), OPTIONAL),
    **{name: [NUMBER] for name in ("ra_e", "expert_load", "expert_load_adversarial")},
    **dict.fromkeys(("route_radius", "certificate"), (dict, type(None))),
    "aa_flags": (list, type(None)),
    "attack": {"steps": int, "restarts": int, "alpha_ratio": NUMBER},
    "attacks": {str: NUMBER},
    "intervals": {str: [NUMBER]},
    "checks": {str: {"passed": bool, "value": (*OPTIONAL, bool)}},
    "eps_curve": [[NUMBER]],
}
REPORT["baselines"] = {str: REPORT}


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replaces the file atomically: a reader, or a crash, sees the old content or the new, never a mixture."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _naming(path):
            with unfinished.open("wb") as file:
                file.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the path to an error that lacks one, such as "No space left on device"."""
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
        raise UserError(f"{path} does not exist: did the command that writes it finish?") from None
    except SafetensorError as error:
        raise damaged(path, str(error)) from None


def floating_dtype(path: Path) -> str:
    """The dtype of the floating-point tensors in a file of weights, such as float32."""
    kinds = {str(t.dtype).removeprefix("torch.") for t in load_tensors(path).values() if t.is_floating_point()}
    return ", ".join(sorted(kinds))


def refusal(error: Exception) -> str:
    """Why a file of weights was not read, in one line; torch's own message is a page on how to trust the file."""
    named = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
    return f"it holds a {named[1]}: save model.state_dict()" if named else " ".join(str(error).split())[:200]


def load_weights(path: Path, model: nn.Module) -> None:
    tensors, own = load_tensors(path), model.state_dict()
    for name, t in tensors.items():
        if name in own and t.is_floating_point() != own[name].is_floating_point():
            raise damaged(path, f"{name} must be {own[name].dtype}, got {t.dtype}")
        if not t.isfinite().all():
            raise damaged(path, f"{name} must be finite, got {t[~t.isfinite()][0].item()}")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the run's config.json: {' '.join(str(error).split())}") from None


def demand_usable(out: Path, resume: bool) -> bool:
    """Whether the folder holds a run; refuses one that may not be trained into."""
    holds_run = (out / "config.json").exists()
    if holds_run and not resume:
        raise UserError(
            f"--out {out} already holds a run: give another folder, remove it, or continue it with --resume"
        )
    if holds_run and not (out / RESUME).exists() and ABSOLUTE not in read_json(out / "config.json", {}):
        raise UserError(f"--out {out} holds an exported run, which cannot be resumed: give another folder")
    if not holds_run and out.exists() and not (out.is_dir() and set(out.iterdir()) == _unfinished(out)):
        raise UserError(
            f"--out {out} already exists and is not an empty folder: give another folder, or remove it first"
        )
    return holds_run


@contextlib.contextmanager
def open_run(out: Path, config: Config, resume: bool) -> Iterator[None]:
    """Makes the folder of a run and its config.json, or resumes the run that is there; locks it for this process.

    Raises:
        UserError: if the folder is in use, or holds something else or a run with other settings.
    """
    holds_run = demand_usable(out, resume)
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        _lock(folder, out)
        for path in _unfinished(out):
            path.unlink()
        if holds_run:
            _demand_equal(config, run_config(out), out)
        else:
            place = {ABSOLUTE: os.path.abspath(config.data_dir)}
            write_json(out / "config.json", dataclasses.asdict(config) | place)
        yield
    finally:
        os.close(folder)


def _lock(folder: int, out: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, in whatever way
    except BlockingIOError:
        raise UserError(f"--out {out} is in use by another process that trains") from None


def _unfinished(out: Path) -> set[Path]:
    """The temporary files of write_atomic that a killed process left behind."""
    return {path for path in out.iterdir() if re.fullmatch(r"\..+\.\d+", path.name)}


def _demand_equal(config: Config, before: Config, out: Path) -> None:
    for name, new in dataclasses.asdict(config.elsewhere(before.data_dir)).items():
        if new != (old := getattr(before, name)):
            raise UserError(f"{name} must stay {old} for the run in {out}, got {new}: give another folder")


def run_config(run: Path, data_dir: str | None = None) -> Config:
    """The settings of a run; `data_dir` overrides where its data is."""
    _demand_folder(run)
    if not (run / "config.json").exists():
        raise UserError(f"RUN must be a folder made by `rter train`, but {run} holds no config.json")
    config = load_config(run / "config.json")
    return config if data_dir is None else config.elsewhere(data_dir)


def demand_no_run(out: Path) -> None:
    """Refuses a folder whose report.json and metrics.jsonl are those of a run."""
    if (out / "config.json").exists():
        raise UserError(f"out must not be the folder of another run, got {out}: give another folder")


def _demand_folder(run: Path) -> None:
    if not run.is_dir():
        raise UserError(f"RUN must be a folder, but {run} {'is a file' if run.exists() else 'does not exist'}")


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, form: Any) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: if it is damaged or does not have the `form`, see `_demand_form`.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8 too
        raise damaged(path, str(error)) from None
    _demand_form(path, value, form, "the file")
    return value


def _demand_form(path: Path, value: Any, form: Any, name: str) -> None:
    """`form` is a type, or a tuple of types, or [form of every item], or {str: form of every value}, or a dict that
    gives the form of each key."""
    expected = type(form) if isinstance(form, (dict, list)) else form
    if not isinstance(value, expected) or (isinstance(value, bool) and form is not bool):
        kinds = dict.fromkeys(NAMES[kind] for kind in (expected if isinstance(expected, tuple) else (expected,)))
        raise damaged(path, f"{name} must be {' or '.join(kinds)}, got {value!r:.60}")
    parts: list[tuple[Any, Any]] = []
    if isinstance(form, list):
        parts = [(i, form[0]) for i in range(len(value))]
    elif isinstance(form, dict):
        parts = [(key, form[str]) for key in value] if str in form else list(form.items())
    for key, part in parts:
        if isinstance(value, dict) and key not in value:
            raise damaged(path, f"{name} must hold {key!r}, which is missing")
        _demand_form(path, value[key], part, f"{name}[{key!r}]")


def read_report(run: Path) -> dict[str, Any]:
    _demand_folder(run)
    try:
        return read_json(run / "report.json", REPORT)
    except FileNotFoundError:
        raise UserError(f"{run} holds no report.json: run `rter evaluate {run}` first") from None


def append_line(path: Path, record: dict[str, Any]) -> None:
    with _naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The epochs in a metrics.jsonl. An incomplete last line, where training was killed, is skipped.

    Raises:
        UserError: if another line is damaged.
    """
    records = []
    lines = path.read_bytes().splitlines(keepends=True)
    for i, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if i == len(lines) and not line.endswith(b"\n"):
                say(f"skipped the incomplete last line of {path}: rter train --out {path.parent} --resume continues")
                break
            raise damaged(path, f"line {i}: {error}") from None
        _demand_form(path, record, METRICS, f"line {i}")
        records.append(record)
    return records


def keep_lines(path: Path, count: int) -> None:
    """Cuts the file to its first `count` lines; the epochs of later ones, which may be incomplete, are repeated."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if len(lines) < count:
        raise damaged(path, f"it holds {len(lines)} lines where the run's state says {count}")
    if len(lines) > count:
        write_atomic(path, b"".join(lines[:count]))


def write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for record in records for name in record)))
    table.writeheader()
    table.writerows(records)
    write_atomic(path, text.getvalue())
