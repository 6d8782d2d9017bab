"""The finished parts of an evaluation, one per line of a file, from which an evaluation that was killed resumes."""

import base64
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from rter.errors import UserError
from rter.seeds import seed_for

Found = dict[str, Any]  # values are tensors, or what JSON can hold


def difference(before: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """How an evaluation differs from one before, in words; empty if it is the same."""
    hashed = {"model": "of another model", "images": "of other images"}
    for name in sorted(identity, key=lambda name: name != "torch"):  # another torch changes the model's hash, too
        if identity[name] != before.get(name):
            return hashed.get(name, f"with {name} {before.get(name)}, not {identity[name]}")
    return ""


class Journal:
    """Keeps what each part has found in memory and, if one is given, in a file.

    The first line of the file says what is evaluated and how. Each part has random states of its own, derived from the
    seed and its name, so it finds the same whether or not earlier parts were read from the file.

    Args:
        file: the file, which `finish` removes; None keeps the parts in memory only.
        identity: what is evaluated and how; the values must be what JSON can hold.
        seed: of the parts' random states.
        device: whose random state is seeded for a part, besides that of the CPU.

    Raises:
        UserError: if the file holds another evaluation, is damaged, or is in use.
    """

    def __init__(self, file: Path | None, identity: dict[str, Any], seed: int, device: torch.device) -> None:
        self.path, self.seed, self.device = file, seed, device
        self.parts: dict[str, dict[str, Any]] = {}
        self.resumed = False  # whether the file was there before
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file.open("a+b")
        try:
            self._lock()
            self._read(json.loads(json.dumps(identity)))
        except BaseException:
            self.file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, in whatever way
        except BlockingIOError:
            raise UserError(f"{self.path} is in use by another evaluation") from None

    def _read(self, identity: dict[str, Any]) -> None:
        self.file.seek(0)
        lines = self.file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # incomplete, since its process was killed
            self.file.truncate(sum(map(len, lines[:-1])))
            lines.pop()
        self.resumed = bool(lines)
        if not lines:
            self._append(identity)
            return
        try:
            first, *parts = map(json.loads, lines)
            before = {name: first[name] for name in identity}
            self.parts = {part["part"]: part for part in parts}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path} is damaged: remove it to start the evaluation again") from None
        if what := difference(before, identity):
            begun = f"{self.path} holds an unfinished evaluation {what}"
            raise UserError(f"{begun}: give another folder, or remove the file")

    def _append(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def part(self, name: str, compute: Callable[[], Found]) -> Found:
        """What the part of this name finds; computed only if it is not in the journal."""
        if name not in self.parts:
            started = time.perf_counter()
            with seeded(seed_for(self.seed, "part", name), self.device):
                found = compute()
            record = {"part": name, "seconds": time.perf_counter() - started, **_encode(found)}
            self.parts[name] = record
            if self.path is not None:
                self._append(record)
        return _decode(self.parts[name])

    def seconds(self, prefix: str) -> float:
        """How long all parts took whose names begin with the prefix."""
        return sum(part["seconds"] for name, part in self.parts.items() if name.startswith(prefix))

    def finish(self) -> None:
        """Removes the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            self.file.close()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the random states of the CPU and of the device, and restores them on exit."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield


def _encode(found: Found) -> dict[str, Any]:
    tensors = {name: value.cpu().contiguous() for name, value in found.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in found.items() if name not in tensors}
    return {"tensors": base64.b64encode(safetensors.torch.save(tensors)).decode(), "values": others}


def _decode(record: dict[str, Any]) -> Found:
    return {**safetensors.torch.load(base64.b64decode(record["tensors"])), **record["values"]}
