"""`rter evaluate --model FILE.py:FUNCTION`: models from users' files, killed and resumed; mistakes in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from rter.__main__ import main
from rter.checkpoint import load_tensors
from rter.evaluate import JOURNAL
from rter.foreign import load_model
from runs import broken_off

FILE = """
import torch
from torch import nn
from beside import CLASSES
from moe_kernels import RobustMoE

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))

def moe():
    return RobustMoE.from_experts([net(), net()], nn.Sequential(nn.Flatten(), nn.Linear(64, 2)))

def vit():
    from transformers import ViTConfig, ViTForImageClassification
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **sizes))

def sized(classes, width=3):
    return net()

def broken():
    raise RuntimeError("no such\\nfile")

def nothing():
    return {"net": net()}

def likely():
    return nn.Sequential(net(), nn.Softmax(1))
"""
KNOWN = "net, moe, vit, sized, broken, nothing, likely"
SMALL = ["--data", "digits", "--images", "30", "--eps", "1/10", "--suite", "quick", "--steps", "2", "--restarts", "2",
         "--batch-size", "10"]  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("CLASSES = 10")
    (tmp_path / "models.py").write_text(FILE)
    return tmp_path / "models.py"


def figures(out: Path) -> dict[str, Any]:
    report = json.loads((out / "report.json").read_text())
    return report | {"attack_results": [{**result, "seconds": 0} for result in report["attack_results"]]}


@pytest.mark.parametrize("function", ["net", "moe", "vit"])
def test_a_killed_command_resumes_to_the_same_bits(
    function: str, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if function == "vit":
        pytest.importorskip("transformers")
    whole, killed = file.parent / "whole", file.parent / "killed"
    command = ["evaluate", "--model", f"{file}:{function}", *SMALL, "--out"]
    torch.manual_seed(3)  # moe() draws its router
    assert main([*command, str(whole)]) == 0
    said = capsys.readouterr().out
    assert f"of {file}:{function}: 30 images, Linf perturbations of radius 0.1, quick suite, seed 0" in said
    assert f"routes: {'attacked' if function == 'moe' else 'none: the model has no experts'}" in said
    for after in (3, 9):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            broken_off(after, patch)
            torch.manual_seed(3)
            main([*command, str(killed)])
    torch.manual_seed(3)
    assert main([*command, str(killed)]) == 0
    assert figures(killed) == figures(whole) and figures(whole)["sample"] == {"of": 1797, "seed": 0}
    first, second = (load_tensors(out / "examples.safetensors") for out in (whole, killed))
    assert all(torch.equal(first[name], value) for name, value in second.items())
    assert main(["report", str(killed)]) == 0
    text = (killed / "report.md").read_text()
    assert "Measured on 30 of the 1797 given images (drawn by seed 0" in text and "| verdict" in text
    page = (killed / "report.html").read_text()
    assert f"rter evaluate --model {file}:{function} --data digits --images 30 " in page and "Training" not in page


def test_a_killed_process_resumes(file: Path) -> None:
    """Another process resumes it, and starts over in another folder."""
    whole, killed = file.parent / "whole", file.parent / "killed"
    command = ["evaluate", "--model", f"{file}:net", *SMALL, "--restarts", "40", "--out"]
    options: dict[str, Any] = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-m", "rter", *command, str(killed)], **options)
    journal = killed / JOURNAL
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 12):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert journal.exists() and not (killed / "report.json").exists()
    both = f"from rter.__main__ import main; print([main([*{command}, out]) for out in {[str(killed), str(whole)]}])"
    subprocess.run([sys.executable, "-c", both], check=True, **options)
    assert figures(killed) == figures(whole) and not journal.exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "nested", "parallel"])
def test_weights_of_every_kind_are_loaded(suffix: str, file: Path) -> None:
    weights = {name: value + 1 for name, value in load_model(f"{file}:net").state_dict().items()}
    path = file.parent / f"weights.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        kept = {f"module.{n}": v for n, v in weights.items()} if suffix == "parallel" else weights
        torch.save({"epoch": 3, "state_dict": kept} if suffix == "nested" else kept, path)
    loaded = load_model(f"{file}:net", path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["evaluate", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rter: error: ") and said.count("\n") == 1
    return said.removeprefix("rter: error: ").rstrip("\n")


def test_mistakes_of_a_function_are_one_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file.parent / "torn.py").write_text("def net(:\n")
    (file.parent / "needy.py").write_text("import no_such_package\n")
    for spec, message in (
        ("models.py", "--model must be FILE.py:FUNCTION, got 'models.py'"),
        ("models.py:", "--model must be FILE.py:FUNCTION, got 'models.py:'"),
        ("none.py:net", "--model none.py does not exist"),
        ("torn.py:net", "--model torn.py raised SyntaxError: invalid syntax (line 1)"),
        ("needy.py:net", "--model needy.py raised ModuleNotFoundError: No module named 'no_such_package' (line 1)"),
        ("models.py:nett", f"--model models.py has no function nett; it has {KNOWN}: did you mean net?"),
        ("models.py:CLASSES", f"--model models.py has no function CLASSES; it has {KNOWN}"),
        ("models.py:sized", "--model models.py:sized must be a function without arguments, but needs classes"),
        ("models.py:broken", "--model models.py:broken raised RuntimeError: no such file (line 24)"),
        ("models.py:nothing", "--model models.py:nothing must return a torch.nn.Module, got dict"),
        ("models.py:likely", "model must return logits, got probabilities (none below 0, and each row sums to 1), "
                             "which hide gradients: return the input of the softmax"),
    ):  # fmt: skip
        here = Path.cwd()
        os.chdir(file.parent)
        try:
            assert mistake(capsys, "--model", spec, *SMALL, "--out", "out") == message
        finally:
            os.chdir(here)


def test_mistakes_of_weights_are_one_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, path = load_model(f"{file}:net").state_dict(), file.parent / "weights.pt"
    command = ["--model", f"{file}:net", *SMALL, "--out", str(file.parent / "out"), "--weights", str(path)]
    assert mistake(capsys, *command) == f"--weights {path} does not exist"
    path.write_bytes(b"PK torn")
    assert mistake(capsys, *command).startswith(f"--weights {path} must be a state dict of tensors alone: ")
    torch.save(torch.nn.Linear(2, 2), path)
    said = "it holds a torch.nn.modules.linear.Linear: save model.state_dict()"
    assert mistake(capsys, *command) == f"--weights {path} must be a state dict of tensors alone: {said}"
    torch.save([1, 2], path)
    assert mistake(capsys, *command) == f"--weights {path} must hold a state dict of tensors, got list"
    torch.save({name: value for name, value in weights.items() if "bias" not in name} | {"head": torch.ones(2)}, path)
    said = f"--weights {path} does not fit the model: 3 missing (0.bias, 1.bias, 4.bias); 1 not in the model (head)"
    assert mistake(capsys, *command) == said
    torch.save(weights | {"4.bias": torch.zeros(5)}, path)
    assert (
        mistake(capsys, *command) == f"--weights {path} does not fit the model: 4.bias is [5] where the model's is [10]"
    )


def test_mistakes_of_the_command_are_one_line(file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = ["--model", f"{file}:net"]
    assert mistake(capsys) == "give either a RUN or --model FILE.py:FUNCTION, got neither"
    assert mistake(capsys, "run", *model).endswith("got both")
    assert mistake(capsys, "run", "--eps", "0.1") == "--eps goes with --model; a RUN has its own"
    assert mistake(capsys, "run", "--weights", "w.pt") == "--weights must be last or best for a RUN, got 'w.pt'"
    assert mistake(capsys, *model, *SMALL) == "--out must be given with --model"
    out = ["--out", str(tmp_path / "out")]
    assert mistake(capsys, *model, *SMALL, *out, "--data", "mnist").startswith("--data must be one of digits, cifar10")
    assert mistake(capsys, *model, *SMALL, *out, "--eps", "8").startswith("eps must be at most 1, the width of bounds")
    assert mistake(capsys, *model, *SMALL, *out, "--norm", "L7") == "norm must be one of Linf, L2, L1, got 'L7'"
    assert mistake(capsys, *model, *SMALL, *out, "--seed", "x") == "--seed must be a whole number, got 'x'"
