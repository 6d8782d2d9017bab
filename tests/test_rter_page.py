"""report.html in Debian's chromium (skipped without it, except in CI): no request, no error, every plot visible."""

import base64
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rter.__main__ import main
from rter.page import ATTACKS

TINY = ["--epochs", "2", "--batch-size", "40", "--num-experts", "2", "--width", "2", "--attack-steps", "1",
        "--held-out", "20", "--eval-every", "1", "--data", "image-folder", "--image-size", "12"]  # fmt: skip
WEAK = ["--suite", "quick", "--steps", "2", "--restarts", "2"]
CLASSES = ("Katze & <Hund>", "größte Eule", "zebra")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on pictures of three classes with names that HTML must escape, and all their pages."""
    from PIL import Image

    place = tmp_path_factory.mktemp("page")
    for i, name in enumerate(CLASSES):
        folder = place / "data" / name
        folder.mkdir(parents=True)
        for j in range(30):
            Image.new("RGB", (12, 12), (80 * i + j, 40, 255 - 80 * i)).save(folder / f"{j}.png")
    settings = [*TINY, "--data-dir", str(place / "data")]
    for method in ("rt-er", "standard"):
        assert main(["train", "--out", str(place / method), "--method", method, *settings]) == 0
        assert main(["evaluate", str(place / method), *WEAK]) == 0
    assert main(["report", str(place / "rt-er"), "--baselines", str(place / "standard")]) == 0
    page = str(place / "comparison.html")
    assert main(["report", str(place / "rt-er"), str(place / "standard"), "--out", page]) == 0
    return place


PAGES = ["rt-er/report.html", "comparison.html"]


class Parsed(HTMLParser):
    """The text of a page and the attributes of its elements; fails where elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_one_file_and_explains_its_terms(runs: Path, page: str) -> None:
    content = (runs / page).read_text(encoding="utf-8")
    parsed = Parsed(content)
    for tag, name, value in parsed.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:", "#")), (tag, name, value[:80])
    assert not re.search(r"<script|@import|url\((?!#)", content)
    ids = [value for _, name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 20
    used = {value[1:] for _, name, value in parsed.attributes if name in ("href", "xlink:href") and value[0] == "#"}
    used |= set(re.findall(r"url\(#([^)]*)\)", content))
    assert used <= set(ids)
    for name in CLASSES:
        assert name in parsed.text
    report = json.loads((runs / "rt-er" / "report.json").read_text())
    assert report["classes"] == list(CLASSES)
    for said in ("accuracy on clean images", "95 % intervals by Wilson", "seed 0", f"torch {report['torch']}",
                 report["made_with"]["device"], f"rter evaluate {runs / 'rt-er'} --weights last --suite quick",
                 "it is proved that no perturbation", "theorem 5.4", "standard"):  # fmt: skip
        assert said in parsed.text, said
    for attack in report["attacks"]:
        assert any(attack.startswith(start) and meaning in parsed.text for start, meaning in ATTACKS.items()), attack


def test_runs_of_one_name_are_not_compared(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs / "rt-er"), str(runs / "rt-er")]) == 2
    assert f"RUN must be folders of different names, got {runs / 'rt-er'}, {runs / 'rt-er'}" in capsys.readouterr().err


class Browser:
    """Chromium's debugging protocol over a web socket, as much of it as is needed here."""

    def __init__(self, port: int) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            target = next(each for each in json.load(answer) if each["type"] == "page")
        path = "/" + target["webSocketDebuggerUrl"].split("/", 3)[3]
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self.file = self.socket.makefile("rb")
        while self.file.readline().strip():
            pass
        self.count, self.events = 0, []  # type: ignore[var-annotated]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        content = json.dumps({"id": self.count, "method": method, "params": parameters}).encode()
        size = bytes([128 + len(content)]) if len(content) < 126 else b"\xfe" + struct.pack(">H", len(content))
        self.socket.sendall(b"\x81" + size + bytes(4) + content)  # a mask of zeros
        while (message := self._receive()).get("id") != self.count:
            self.events.append(message)
        assert "error" not in message, message
        result: dict[str, Any] = message["result"]
        return result

    def wait(self, method: str) -> None:
        while all(event["method"] != method for event in self.events):
            self.events.append(self._receive())

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def _receive(self) -> dict[str, Any]:
        content = b""
        while True:
            first, size = self.file.read(2)
            size &= 127
            if size >= 126:
                size = struct.unpack(*((">H", self.file.read(2)) if size == 126 else (">Q", self.file.read(8))))[0]
            content += self.file.read(size)
            if first & 128:
                message: dict[str, Any] = json.loads(content)
                return message


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop("no chromium on this machine: apt-get install chromium")
    profile = tmp_path_factory.mktemp("profile")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0",
             f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
    process = subprocess.Popen([CHROMIUM, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port, until = profile / "DevToolsActivePort", time.monotonic() + 60
        while not (port.exists() and port.read_text().strip()) and time.monotonic() < until:
            assert process.poll() is None, "chromium ended before it began"
            time.sleep(0.05)
        yield Browser(int(port.read_text().split()[0]))
    finally:
        process.terminate()
        process.wait()


VISIBLE = """[...document.querySelectorAll('figure svg')].map(svg => {
    const box = svg.getBoundingClientRect(), drawn = svg.getBBox(), style = getComputedStyle(svg);
    const ink = [...svg.querySelectorAll('text')].map(text => getComputedStyle(text).fill);
    return [box.width, box.height, drawn.width, drawn.height, svg.checkVisibility(), ink.length, [...new Set(ink)]];
})"""


LETTERS = """[...document.querySelectorAll('td, p, small, svg text')].map(text =>
    parseFloat(getComputedStyle(text).fontSize) * (text.getScreenCTM ? text.getScreenCTM().a : 1))"""


# no figure is broken into lines
WHOLE = """[...document.querySelectorAll('td')].every(cell => {
    const range = document.createRange();
    range.selectNodeContents(cell);
    const lines = new Set([...range.getClientRects()].map(box => Math.round(box.top)));
    return lines.size <= 1 + 2 * cell.children.length;
})"""


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_in_a_browser(browser: Browser, runs: Path, page: str, scheme: str, width: int) -> None:
    browser.events.clear()
    for domain in ("Page", "Runtime", "Network", "Log"):
        browser.call(f"{domain}.enable")
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.call("Page.navigate", url=(runs / page).as_uri())
    browser.wait("Page.loadEventFired")
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 28)"}[scheme]
    found = browser.value(VISIBLE)
    assert len(found) == (3 if page == PAGES[0] else 5)  # accuracy, and of each run its experts and its training
    for box_width, box_height, drawn_width, drawn_height, visible, texts, inks in found:
        assert min(box_width, box_height, drawn_width, drawn_height) > 100 and visible and texts > 5
        assert all(contrast(ink, paper) > 3 for ink in inks), inks
    pictures = "[...document.images].map(image => image.complete && image.naturalWidth > 0 && image.width > 20)"
    assert browser.value(pictures) and all(browser.value(pictures))
    assert browser.value("document.documentElement.scrollWidth") <= width  # tables and plots scroll by themselves
    assert min(browser.value(LETTERS)) >= 9 and browser.value(WHOLE)
    asked = [event["params"] for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    assert [url for each in asked if not (url := each["request"]["url"]).startswith("data:")] == [
        (runs / page).as_uri()
    ]
    problems = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert not [event for event in browser.events if event["method"] in problems]


def contrast(ink: str, paper: str) -> float:
    """The ratio of luminances that WCAG defines, of colours as in rgb(1, 2, 3)."""

    def luminance(colour: str) -> float:
        levels = [int(level) / 255 for level in re.findall(r"\d+", colour)[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in levels]
        return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(ink), luminance(paper)))
    return (high + 0.05) / (low + 0.05)
