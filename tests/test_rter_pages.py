"""`rter` accepts every command in the documentation's code blocks, and those of the README run, shortened."""

import re
import shlex
from pathlib import Path

import pytest
from rter.__main__ import main
from rter.commands import given_settings
from rter.methods import METHODS
from rter.parser import make_parser
from rter.settings import load_settings, make_config

ROOT = Path(__file__).parent.parent
README = ROOT / "python" / "README.md"
PAGES = [ROOT / "README.md", README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK_LINE = re.compile(r"^ {4}(.*\brter (?:train|evaluate|report|demo|sweep|data) .*)$", re.MULTILINE)
SHORT = {
    "train": "--epochs 1 --width 2 --attack-steps 1 --batch-size 700 --held-out 60",
    "evaluate": "--suite quick --steps 1 --restarts 1",
    "report": "",
}


def commands(page: Path) -> list[list[str]]:
    """The words after `rter` of each command in a page's indented blocks."""
    lines = BLOCK_LINE.findall(page.read_text().replace("\\\n", " "))
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [each[each.index("rter") + 1 :] if "rter" in each else each[1:] for each in words]


RUN_HERE = [w for w in commands(README) if w[0] in SHORT and "runs/sweep" not in w]


def test_the_readmes_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other in one folder, as a reader would."""
    monkeypatch.chdir(tmp_path)
    for words in RUN_HERE:
        status = main([*words, *SHORT[words[0]].split()])
        assert status == 0, f"rter {' '.join(words)}: {capsys.readouterr().err}"


def test_every_method_has_its_command() -> None:
    assert {words[words.index("--method") + 1] for words in RUN_HERE if "--method" in words} == set(METHODS)
    table = (ROOT / "docs" / "methods.md").read_text()
    assert all(f"| `{method}` |" in table for method in METHODS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        args = make_parser().parse_args(words)
        file = load_settings(args.config) if vars(args).get("config") else {}
        make_config(**(file | given_settings(args)))
