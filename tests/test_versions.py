"""docs/versions.md covers every supported torch and reports no failure."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent
VERSIONS = runpy.run_path(str(ROOT / "checks/versions.py"))


def test_every_version_was_tried_and_none_failed() -> None:
    text = (ROOT / "docs/versions.md").read_text()
    rows = re.findall(r"^\| (2\.\S+) \|(.*)$", text, re.M)
    assert [torch.split("+")[0] for torch, _ in rows] == VERSIONS["VERSIONS"]
    assert not re.search(r"fail|none to load", "".join(cells for _, cells in rows))
    assert f"torch >= {VERSIONS['OLDEST'].removesuffix('.0')}," in text


def test_the_page_follows_from_the_results() -> None:
    results = [
        {"torch": "2.11.0+cu130", "cuda": "13.0", "build": "26 operators"},
        {"torch": "2.13.0", "test": "**fails**"},
    ]
    rows = [line for line in VERSIONS["page"](results).splitlines() if line.startswith("| 2.")]
    assert rows[0].startswith("| 2.11.0+cu130 | 13.0 | not run | not run | 26 operators |")
    assert len(rows) == 2 and rows[1].count("**fails**") == 1
