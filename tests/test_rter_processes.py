"""`rter` in separate processes: closed streams, locales, Ctrl-C and missing packages."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ["--epochs", "1", "--batch-size", "900", "--num-experts", "2", "--width", "2", "--attack-steps", "1",
        "--held-out", "60", "--method", "standard"]  # fmt: skip
CALL = "import sys; from rter.__main__ import main; sys.exit(main(sys.argv[1:]))"


def rter(words: list[str], code: str = CALL, cwd: Path | None = None, **env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=cwd, env={**os.environ, **env})


def test_missing_packages_are_one_line(tmp_path: Path) -> None:
    """One package that is imported at the start, and one that is imported when it is needed."""
    code = """
import sys
from rter.__main__ import main
for package in ("safetensors", "sklearn"):
    sys.modules[package] = None
    assert main(["train", "--out", sys.argv[1]]) == 2
    del sys.modules[package]
sys.modules["numpy.core.missing"] = None
try:
    main(["--version"])
except SystemExit as end:
    assert end.code == 0
"""
    done = rter([str(tmp_path / "run")], code)
    expected = "".join(
        f"rter: error: the package {package} is missing: pip install 'moe_kernels[rter]'\n"
        for package in ("safetensors", "sklearn")
    )
    assert (done.returncode, done.stderr) == (0, expected) and not (tmp_path / "run").exists()
    assert "moe_kernels 0.1.0, torch 2" in done.stdout


def test_every_package_of_the_extra_is_named() -> None:
    """Every package that pyproject.toml's extra installs is among those that the message can name."""
    from rter.errors import EXTRA

    text = (ROOT / "pyproject.toml").read_text()
    extra = text[text.index("\nrter = [") : text.index("\nhub = [")]
    named = {"pillow": "PIL", "scikit-learn": "sklearn"}
    packages = {line.split(">=")[0].strip(" [\"'\n") for line in extra.partition("=")[2].split(",")}
    assert {named.get(package, package) for package in packages} <= set(EXTRA)


def test_the_function_says_which_extra_is_missing() -> None:
    code = """
import sys
sys.modules["safetensors"] = None
try:
    from rter import evaluate_model
except ImportError as error:
    print(type(error).__name__, error)
"""
    said = "ModuleNotFoundError the package safetensors is missing: pip install 'moe_kernels[rter]'\n"
    assert rter([], code).stdout == said


@pytest.mark.parametrize(("processes", "said"), [("1", "saved\nfinalised\n"), ("2", "saved\n")])
def test_one_of_several_processes_ends_without_finalising_python(processes: str, said: str) -> None:
    """A thread of gloo that waits for the GIL to free a tensor would abort it then."""
    code = """
import atexit
import rter.commands
from rter.__main__ import command
atexit.register(print, "finalised")
def run(arguments):
    print("saved")  # into the pipe's buffer
    return 3
rter.commands.run = run
command()
"""
    done = rter([], code, WORLD_SIZE=processes, PYTHONUNBUFFERED="")
    assert (done.returncode, done.stdout) == (3, said), done.stderr


def test_ctrl_c_during_the_import(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = rter(["--version"], cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert (done.returncode, done.stderr, done.stdout) == (130, "rter: stopped\n", "")


def test_ctrl_c_stops_the_runs_of_a_sweep(tmp_path: Path) -> None:
    """At a terminal it goes to every process of the command; each run can go on from the step that it was at."""
    runs = [tmp_path / f"standard-{seed}" for seed in (0, 1)]
    words = ["sweep", "--out", str(tmp_path), "--methods", "standard", "--seeds", "0", "1", "2", "--jobs", "2",
             "--epochs", "1000000", "--num-experts", "2", "--width", "2", "--eval-every", "1000000"]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", CALL, *words], stderr=subprocess.PIPE, start_new_session=True)
    try:
        deadline = time.monotonic() + 400
        while not all((run / "config.json").exists() for run in runs):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)  # for the first steps
        os.killpg(process.pid, signal.SIGINT)
        error = process.communicate(timeout=200)[1].decode()
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in error
    assert error.splitlines()[-1].startswith("rter: stopped; to resume: rter sweep --out ")
    assert all((run / "resume.safetensors").exists() for run in runs) and not (tmp_path / "standard-2").exists()


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&- <&-"])
def test_closed_streams_are_no_error(closed: str, tmp_path: Path) -> None:
    command = f'exec "$@" {closed}'
    words = [sys.executable, "-c", CALL, "train", "--out", str(tmp_path / "run"), *TINY]
    done = subprocess.run(["sh", "-c", command, "sh", *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert record["epoch"] == 1


def test_a_reader_may_close_the_pipe_early(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CALL, "--version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (1, b"")


def test_names_outside_ascii_under_an_ascii_locale(tmp_path: Path) -> None:
    """The names of a settings file with a byte order mark, of the run's folder, of the data and of a baseline."""
    (tmp_path / "größe.TOML").write_text('\ufeff# ±\nmethod = "standard"\ndata_dir = "dätä"\n', encoding="utf-8")
    code = """
import locale, sys
from rter.__main__ import main
assert locale.getpreferredencoding(False) == "ANSI_X3.4-1968"
settings, run, other, *tiny = sys.argv[1:]
weak = "--suite quick --steps 1 --restarts 1".split()
for each in (run, other):
    assert main(["train", "--config", settings, "--out", each, *tiny]) == 0
    assert main(["evaluate", each, *weak]) == 0
assert main(["report", run, "--baselines", other]) == 0
assert main(["train", "--config", run + "/config.json", "--out", run]) == 2
assert main(["sweep", "--out", "sweep", "--methods", "standard", "--seeds", "0", "1", *tiny[:-2], *weak]) == 0
"""
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = rter(["größe.TOML", "rün", "zwölf", *TINY], code, tmp_path, **ascii_locale)
    assert done.returncode == 0, done.stderr
    (error,) = (line for line in done.stderr.splitlines() if ": error: " in line)  # a slow machine adds its progress
    assert "already holds a run" in error and "Warning" not in done.stderr and "Traceback" not in done.stderr
    report = (tmp_path / "rün" / "report.md").read_text(encoding="utf-8")
    assert report.startswith("# rün: standard on digits") and "| zwölf |" in report
    config = json.loads((tmp_path / "rün" / "config.json").read_text(encoding="utf-8"))
    assert [os.fsencode(config[key]) for key in ("data_dir", "data_dir_absolute")] == [
        "dätä".encode(), f"{tmp_path}/dätä".encode(),
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "python").rglob("*.py")), ids=lambda path: path.stem)
def test_files_are_written_in_utf8_in_every_locale(path: Path) -> None:
    for call in (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        words = {word.arg for word in call.keywords}
        strings = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        opens_text = name == "open" and any(set(mode) <= set("rwax+") for mode in strings)
        if name in ("read_text", "write_text") or opens_text:
            assert "encoding" in words, f"{path}, line {call.lineno}: a text without its encoding"
