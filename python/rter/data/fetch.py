"""Downloads a data set: resumes a partial download, verifies the checksum, then unpacks."""

import hashlib
import http.client
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from rter.console import Progress
from rter.data.archives import Archive
from rter.errors import UserError

CHUNK = 1 << 18
TRIES = 5  # attempts in a row without progress before giving up
TIMEOUT = 30  # seconds


def fetch(archive: Archive, folder: Path) -> Path:
    """Downloads the archive into the folder and unpacks it; what is there already is not fetched again.

    Raises:
        UserError: without a network, saying which file to put where; for a wrong checksum; for an unsafe archive.
    """
    file = folder / archive.file
    result = folder / archive.unpacked if archive.unpacked else file
    if archive.unpacked and result.is_dir():
        return result
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        unfinished = file.with_name(f"{file.name}.part")
        _download(archive, unfinished)
        _check(archive, unfinished)
        unfinished.replace(file)
    else:
        _check(archive, file)
    if archive.unpacked:
        unpack(file, folder, archive.unpacked)
    return result


def _download(archive: Archive, path: Path) -> None:
    """Appends to the bytes in `path`, and reconnects when the connection drops as long as there is progress."""
    tries = 0
    while tries < TRIES:
        before = path.stat().st_size if path.exists() else 0
        try:
            if _receive(archive, path):
                return
        except urllib.error.URLError as error:  # no answer, or not the file
            raise _unreachable(archive, path, error.reason) from None
        except (OSError, http.client.HTTPException) as error:
            if not path.exists():
                raise _unreachable(archive, path, error) from None
        tries = 0 if path.stat().st_size > before else tries + 1
    raise UserError(
        f"the connection to {archive.url} dropped at byte {path.stat().st_size}; run this again to continue there"
    )


def _receive(archive: Archive, path: Path) -> bool:
    """Makes one request; returns whether it brought the rest of the file."""
    start = path.stat().st_size if path.exists() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # nothing is left: the checksum decides
            return True
        raise
    with answer:
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else None
        with (
            path.open("ab" if start else "wb") as file,
            Progress(archive.file, total, "byte", done=start, leave=True, scale=True) as progress,
        ):
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                progress.update(len(chunk))
    return total is None or path.stat().st_size == total


def _unreachable(archive: Archive, path: Path, error: object) -> UserError:
    target = path.with_name(archive.file)
    return UserError(
        f"cannot fetch {archive.url} ({error}): run this again with a network, or copy the file, md5 "
        f"{archive.md5}, to {target} and run this again, which checks and unpacks it"
    )


def _check(archive: Archive, path: Path) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != archive.md5:
        size = path.stat().st_size
        raise UserError(
            f"{path} ({size} bytes) is damaged: it has md5 {digest.hexdigest()}, expected {archive.md5}; remove it and "
            "run this again"
        )


def unpack(file: Path, folder: Path, name: str) -> None:
    """Unpacks the folder `name` of a tar or zip file, as a whole or not at all.

    Raises:
        UserError: if the archive is damaged, or holds a link or a path that leads out of its folder.
    """
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder) as place:
        try:
            with _members(file) as members:
                for path, content in members:
                    target = _inside(file, Path(place), path)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with content, target.open("wb") as out:
                        shutil.copyfileobj(content, out)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
            raise UserError(f"{file} is damaged: {error}") from None
        if not (Path(place) / name).is_dir():
            raise UserError(f"{file} must hold a folder {name}")
        (Path(place) / name).replace(folder / name)


@contextmanager
def _members(file: Path) -> Iterator[Iterator[tuple[str, IO[bytes]]]]:
    """Path and content of each file in the archive."""
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            yield ((info.filename, archive.open(info)) for info in archive.infolist() if not info.is_dir())
    else:
        with tarfile.open(file) as tar:
            yield ((info.name, _tar_content(file, tar, info)) for info in tar if not info.isdir())


def _tar_content(file: Path, tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(info) if info.isreg() else None
    if content is None:
        raise UserError(f"{file} is refused: {info.name} is a link or a device")
    return content


def _inside(file: Path, place: Path, name: str) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise UserError(f"{file} is refused: {name} leads out of its folder")
    return place / path
