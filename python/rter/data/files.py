"""Helpers of the readers of all formats: finding files, reading them, and saying what is wrong with them."""

from pathlib import Path

import numpy as np

from rter.errors import UserError


def find_folder(folder: Path, name: str, file: str) -> Path | None:
    """The folder that holds `file`: folder/name, or `folder` itself."""
    return next((place for place in (folder / name, folder) if (place / file).is_file()), None)


def missing(name: str, folder: Path, file: str) -> UserError:
    return UserError(
        f"{folder / file} does not exist: fetch it with `rter data fetch {name} --data-dir {folder}`, or say with "
        "--data-dir where it is"
    )


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged: {what}")


def check_labels(path: Path, labels: np.ndarray, first: int, last: int, where: str, scale: int = 1) -> None:
    """Raises UserError for a label outside first..last; the message places label i at `where` i * scale."""
    bad = np.flatnonzero((labels < first) | (labels > last))
    if len(bad):
        raise damaged(path, f"label {labels[bad[0]]} at {where} {bad[0] * scale}, expected {first} to {last}")
