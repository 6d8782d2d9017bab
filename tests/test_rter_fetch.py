"""Downloads from a server on this machine: resumed, checked, and unpacked without leaving their folder."""

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from rter.__main__ import main
from rter.data.archives import ARCHIVES, Archive
from rter.data.fetch import fetch
from rter.errors import UserError

CONTENT = bytes(range(256)) * 400


class Server:
    """Serves `content`; drops each connection after `drop` bytes; answers ranges if `ranges`."""

    def __init__(self) -> None:
        self.content, self.drop, self.ranges, self.asked = CONTENT, len(CONTENT), True, list[str | None]()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers["Range"]
                server.asked.append(wanted)
                start = int(wanted[6:-1]) if wanted and server.ranges else 0
                if start >= len(server.content):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(server.content) - start))
                self.end_headers()
                self.wfile.write(server.content[start : start + server.drop])

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def archive(self, name: str = "train.mat", unpacked: str | None = None) -> Archive:
        digest = hashlib.md5(self.content).hexdigest()
        return Archive(f"http://127.0.0.1:{self.http.server_port}/{name}", digest, unpacked)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_downloads_once(server: Server, tmp_path: Path) -> None:
    path = fetch(server.archive(), tmp_path / "new")
    assert path.read_bytes() == CONTENT and list(path.parent.iterdir()) == [path]
    assert fetch(server.archive(), path.parent) == path and server.asked == [None]


def test_resumes_where_the_connection_dropped(server: Server, tmp_path: Path) -> None:
    server.drop = 40_000
    assert fetch(server.archive(), tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=40000-", "bytes=80000-"]


def test_resumes_in_another_run(server: Server, tmp_path: Path) -> None:
    (tmp_path / "train.mat.part").write_bytes(CONTENT[:100])
    assert fetch(server.archive(), tmp_path).read_bytes() == CONTENT and server.asked == ["bytes=100-"]
    (tmp_path / "train.mat").rename(tmp_path / "train.mat.part")
    assert fetch(server.archive(), tmp_path).read_bytes() == CONTENT


def test_starts_over_if_the_server_does_not_support_ranges(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "train.mat.part").write_bytes(b"stale")
    assert fetch(server.archive(), tmp_path).read_bytes() == CONTENT


def test_gives_up_without_progress_and_keeps_what_it_has(server: Server, tmp_path: Path) -> None:
    server.drop = 0
    (tmp_path / "train.mat.part").write_bytes(CONTENT[:100])
    with pytest.raises(UserError, match="dropped at byte 100; run this again"):
        fetch(server.archive(), tmp_path)
    assert (tmp_path / "train.mat.part").read_bytes() == CONTENT[:100]


def test_a_wrong_checksum_is_refused(server: Server, tmp_path: Path) -> None:
    archive = server.archive()
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(UserError, match=rf"train.mat.part \(102400 bytes\) is damaged: .*, expected {archive.md5}"):
        fetch(archive, tmp_path)
    assert not (tmp_path / "train.mat").exists()
    (tmp_path / "train.mat").write_bytes(b"brought by hand")
    with pytest.raises(UserError, match="expected"):
        fetch(archive, tmp_path)


def test_offline_says_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = hashlib.md5(CONTENT).hexdigest()
    monkeypatch.setitem(ARCHIVES, "svhn", [Archive("http://127.0.0.1:9/train.mat", digest)])
    command = ["data", "fetch", "svhn", "--data-dir", str(tmp_path)]
    for begun in (False, True):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "cannot fetch http://127.0.0.1:9/train.mat ([Errno " in error
        assert f"copy the file, md5 {digest}, to {tmp_path / 'train.mat'}" in error
        assert begun == (tmp_path / "train.mat.part").exists()
        (tmp_path / "train.mat.part").write_bytes(CONTENT[:100])
    (tmp_path / "train.mat").write_bytes(CONTENT)
    assert main(command) == 0
    assert f"ready: {tmp_path / 'train.mat'}" in capsys.readouterr().out
    assert main(["data", "fetch", "letters"]) == 2
    assert main([*command[:-1], str(tmp_path / "train.mat")]) == 2
    assert f"--data-dir: must be a folder, but {tmp_path / 'train.mat'} is a file" in capsys.readouterr().err


def packed(kind: str, files: dict[str, bytes], link: str | None = None) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=out, mode="w:gz") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            if link:
                info = tarfile.TarInfo(link)
                info.type, info.linkname = tarfile.SYMTYPE, "/etc"
                tar.addfile(info)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_unpacks(server: Server, tmp_path: Path, kind: str) -> None:
    server.content = packed(kind, {"set/a.bin": b"a", "set/b/c.bin": b"c"})
    place = fetch(server.archive(f"set.{kind}", "set"), tmp_path)
    assert (place / "a.bin").read_bytes() == b"a" and (place / "b" / "c.bin").read_bytes() == b"c"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set", f"set.{kind}"]
    assert fetch(server.archive(f"set.{kind}", "set"), tmp_path) == place and len(server.asked) == 1


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize("name", ["../out", "set/../../out", "/tmp/out", "set/..\\out"])
def test_an_archive_cannot_leave_its_folder(server: Server, tmp_path: Path, kind: str, name: str) -> None:
    server.content = packed(kind, {"set/a.bin": b"a", name: b"evil"})
    with pytest.raises(UserError, match="leads out of its folder"):
        fetch(server.archive(f"set.{kind}", "set"), tmp_path / "data")
    assert [p.name for p in (tmp_path / "data").iterdir()] == [f"set.{kind}"]


def test_odd_archives_are_refused(server: Server, tmp_path: Path) -> None:
    server.content = packed("tar.gz", {"set/a.bin": b"a"}, link="set/link")
    with pytest.raises(UserError, match="set/link is a link or a device"):
        fetch(server.archive("link.tar.gz", "set"), tmp_path)
    server.content = packed("tar.gz", {"set/a.bin": bytes(9999)})[:-30]
    with pytest.raises(UserError, match=r"cut.tar.gz is damaged"):
        fetch(server.archive("cut.tar.gz", "set"), tmp_path)
    server.content = packed("zip", {"other/a.bin": b"a"})
    with pytest.raises(UserError, match="must hold a folder set"):
        fetch(server.archive("other.zip", "set"), tmp_path)
