"""The Python code of the pages in docs/ runs as it is printed there, and so do all commands of the first page."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rter
import torch
import torch.nn.functional as F
from PIL import Image
from rter.__main__ import main
from rter.data.folders import load_image_folder
from torch import Tensor, nn

import moe_kernels
from moe_kernels import RobustMoE
from moe_kernels.testing import Source
from moe_kernels.testing.networks import randomize_statistics

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
S = Source(torch.float32)
SHORT = {  # by the command of rter: what makes it a matter of seconds
    "train": "--epochs 1 --width 2 --attack-steps 1 --train-images 100 --batch-size 50 --image-size 16",
    "evaluate": "--steps 2 --restarts 1 --images 20",
    "report": "",
}


def blocks(page: str) -> list[str]:
    """The Python of a page, block by block, also where a list indents it."""
    found = re.findall(r"^( *)```python\n(.*?)^ *```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    return ["\n".join(line.removeprefix(indent) for line in block.splitlines()) for indent, block in found]


def linear(classes: int = 3) -> nn.Module:
    """Of images [B, 3, 2, 2]."""
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes))


def mixture(num_experts: int = 4) -> RobustMoE:
    return RobustMoE.from_experts([linear() for _ in range(num_experts)], linear(num_experts))


@pytest.fixture
def names() -> dict[str, Any]:
    """A mixture and images that it reads rightly."""
    torch.manual_seed(0)
    S.generator.manual_seed(0)
    model, x = mixture(), S.rand(5, 3, 2, 2)
    return {"torch": torch, "nn": nn, "F": F, "model": model, "net": model, "x": x, "y": model(x).argmax(1)}


def test_idea() -> None:
    (block,) = blocks("idea.md")
    names: dict[str, Any] = vars(moe_kernels) | {
        "router": nn.Linear(6, 4),
        "k": 2,
        "num_experts": 4,
        "x": S.randn(5, 6),
        "weight": S.randn(4, 7, 6),
        "bias": S.randn(4, 7),
    }
    exec(block, names)
    every = torch.einsum("eoi,ti->teo", names["weight"], names["x"]) + names["bias"]
    chosen = every.gather(1, names["experts"].long()[..., None].expand(-1, -1, 7))
    torch.testing.assert_close(names["y"], (names["weights"][..., None] * chosen).sum(1))


def test_attack(names: dict[str, Any]) -> None:
    attacks, function, gradient, fold = blocks("attack.md")
    names["model"] = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    names["y"] = names["model"](names["x"]).argmax(1)
    exec(attacks.replace("model(x_adv)", "model(x)", 1), names)  # of which all withstand
    assert names["x_adv"].shape == names["x"].shape
    exec(attacks, names)
    exec(function, names)
    assert 0 < (names["x_adv"] - names["x"]).abs().max() <= 8 / 255
    exec(gradient, names)
    names["image"] = names["x"].clone().requires_grad_()
    loss = F.cross_entropy(names["model"](names["image"]), names["y"])
    torch.testing.assert_close(names["gradient"], torch.autograd.grad(loss, names["image"])[0])
    names["model"] = randomize_statistics(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()))
    exec(fold, names)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in names["folded"].modules())
    torch.testing.assert_close(names["folded"](names["x"]), names["model"](names["x"]))
    assert 0 < (names["x_adv"] - names["x"]).abs().max() <= 8 / 255 + 1e-6


def test_attack_lists_attacks_that_run(names: dict[str, Any]) -> None:
    calls = re.findall(r"^\| `([^`]+)` \|", (DOCS / "attack.md").read_text(), re.MULTILINE)
    assert len(calls) == 5
    names |= vars(moe_kernels) | {"e": 1, "chosen": names["model"].route(names["x"]).experts[:, 0].long()}
    for call in calls:
        x_adv = eval(call, names)
        assert 0 < (x_adv - names["x"]).abs().max() <= 8 / 255 + 1e-6, call


class Deep(nn.Module):
    """A model whose blocks hold a mixture each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"moe": RobustMoE(6, 8, 4)}) for _ in range(2))
        for block in self.blocks:
            block.moe = block["moe"]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block.moe(x)
        return x


def test_mixture(names: dict[str, Any]) -> None:
    deep, networks, route = blocks("mixture.md")
    model = Deep()
    inside = {"F": F, "model": model, "x": S.randn(5, 6), "y": torch.arange(5)}
    exec(deep, inside)
    inside["loss"].backward()
    assert all(block.moe.router.weight.grad.abs().max() > 0 for block in model.blocks)

    inside = {"x": S.rand(16, 3, 32, 32), "y": torch.arange(16) % 10}
    exec(networks, inside)
    inside["loss"].backward()
    router, routing = inside["router"], inside["routing"]
    assert routing.experts.shape == (16, 1) and router[1].weight.grad.abs().max() > 0
    pairs = zip(routing.experts[:, 0], inside["x"], strict=True)
    alone = torch.cat([inside["experts"][e](x[None]) for e, x in pairs])
    torch.testing.assert_close(inside["model"](inside["x"]), routing.weights * alone)

    names |= {"PGD": moe_kernels.PGD, "labels": names["y"]}
    exec(route, names)
    experts, x = names["model"].experts, names["x"]
    torch.testing.assert_close(names["y_first_expert"], experts[0](x))
    second = names["model"].route(x).logits.topk(2).indices[:, 1]
    torch.testing.assert_close(names["y_second"], torch.stack([experts[e](i[None])[0] for e, i in zip(second, x)]))  # noqa: B905
    assert 0 < (names["x_second"] - x).abs().max() <= 8 / 255


def test_evaluation(
    names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for setting, few in {"steps": 3, "restarts": 1, "queries": 20}.items():
        monkeypatch.setitem(rter.evaluate_model.__kwdefaults__, setting, few)
    (block,) = blocks("evaluation.md")
    exec(block, names)
    assert (tmp_path / "evaluation" / "report.json").exists() and names["report"].sa.value == 1
    said, page = capsys.readouterr().out, (DOCS / "evaluation.md").read_text()
    for line in (
        "clean accuracy",
        "under PGD",
        "under AutoAttack",
        "under every attack",
        "expert and route, weight 0.1",
    ):
        assert f"\n{line}" in said and f"    {line}" in page


def test_data(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "make-cifar-digits", "--data-dir", "data"]) == 0
    monkeypatch.setitem(rter.evaluate_model.__kwdefaults__, "suite", "pgd")
    names["model"] = model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    (block,) = blocks("data.md")
    exec(block, names)
    test = names["test"]
    assert names["report"].sa.value == (model(test.x).argmax(1) == test.y).double().mean() and len(test) == 362


def test_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command of the page, one after the other, shortened; what pip does is test_package.py's matter."""
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "start.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line) for line in re.findall(r"^ {4}((?:pip|python|rter) .*)$", text, re.MULTILINE)]
    assert [words[0] for words in commands] == ["pip", "python", "rter", "rter", "rter"]
    for program, *words in commands:
        if program == "python":
            subprocess.run([sys.executable, ROOT / words[0], *words[1:]], check=True)
        if program == "rter":
            assert main([*words, *SHORT[words[0]].split()]) == 0, capsys.readouterr().err
    assert (tmp_path / "runs/robust/report.html").exists()
    use, _ = blocks("start.md")
    names: dict[str, Any] = {"images": S.rand(3, 3, 16, 16)}
    exec(use, names)
    assert names["classes"].shape == (3,) and names["experts"].shape == (3, 1) and not names["model"].training


def test_start_reads_a_photo_as_training_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            path = Path("photos", split, name, "1.jpg")
            path.parent.mkdir(parents=True)
            Image.fromarray((255 * S.rand(45, 60, 3)).byte().numpy()).save(path)
    names: dict[str, Any] = {}
    exec(blocks("start.md")[1], names)
    test = load_image_folder(Path("photos"), 32).test
    assert test and torch.equal(names["images"], test[torch.tensor([0])].x)


def test_the_readme_repeats_rows_of_the_digits() -> None:
    """SA, RA, AA and verdict, the first four columns."""
    digits = (DOCS / "digits.md").read_text()
    rows = re.findall(r"^\| (?:RT-ER|PGD), [^|]*\|(.*±.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 3
    for row, name in zip(rows, ("rt-er", "pgd-at", "dense pgd-at"), strict=True):
        of_digits = re.search(rf"^\| {name} *\|(.*)$", digits, re.MULTILINE)
        assert of_digits and of_digits[1].split("|")[:4] == row.split("|"), name


@pytest.mark.parametrize("weights, problem", [("first", "weights must be one of last, best"), ("last", "missing")])
def test_a_run_that_is_none(weights: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(rter.UserError, match=problem):
        rter.load_model(tmp_path / "missing", weights)
