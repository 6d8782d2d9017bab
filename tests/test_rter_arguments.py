"""Help and mistakes in the arguments are answered at once: without importing torch or other large packages."""

import subprocess
import sys

import pytest

COMMANDS = ["train", "evaluate", "report", "demo", "sweep", "data", "data fetch"]
MISTAKES = {
    "fly": "invalid choice: 'fly'",
    "train": "required: --out",
    "train --out": "argument --out: expected one argument",
    "train --out new --no-such-flag 3": "unrecognized arguments: --no-such-flag",
    "train --out new --method magic": "method must be one of standard, pgd-at, trades, ",
    "train --out new --epochs ten": "epochs must be a whole number, got 'ten'",
    "train --out new --eps -1": "eps must be above 0, got -1.0",
    "train --out new --augment roll": "augment must be auto, none, or flip",
    "train --out new --normalize 1": "normalize must be data, or means/deviations",
    "train --out new --config new.toml": "cannot read new.toml: No such file or directory",
    "evaluate new --suite all": "invalid choice: 'all'",
    "evaluate new --steps 0": "must be a whole number above 0, got '0'",
    "evaluate --model a.py:f --data digits --out new --eps wide": "eps must be a number above 0 or a fraction",
    "evaluate --model a.py:f --data digits --out new --eps 0.1 --seed x": "--seed must be a whole number, got 'x'",
    "report new other --baselines third": "--baselines must be given with one RUN",
    "demo --out new --width x": "width must be a whole number, got 'x'",
    "sweep --out new --methods magic": "--methods must be among rt-er, standard, ",
    "sweep --out new --epochs ten": "epochs must be a whole number, got 'ten'",
    "data fetch cifar": "did you mean cifar10?",
}
RUN = """
import sys
from rter.__main__ import main
try:
    status = main(sys.argv[1].split())
except SystemExit as end:
    status = end.code
large = {name.partition(".")[0] for name in sys.modules} & {"torch", "moe_kernels", "numpy", "matplotlib", "scipy"}
sys.exit(f"imported: {sorted(large)}" if large else status)
"""


def answer(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", RUN, command], capture_output=True, text=True)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_large(command: str) -> None:
    answered = answer(f"{command} --help")
    assert (answered.returncode, answered.stderr) == (0, "")
    assert answered.stdout.startswith(f"usage: rter {command}".strip())


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_in_the_arguments_imports_nothing_large(command: str) -> None:
    answered = answer(command)
    assert answered.returncode == 2 and answered.stdout == "", answered.stderr
    assert answered.stderr.startswith("rter: error: ") and answered.stderr.count("\n") == 1
    assert MISTAKES[command] in answered.stderr
