"""Every network and router as a model of the application, and weights from other code."""

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from rter.__main__ import main
from rter.data.load import load_data
from rter.data.split import Data, Split
from rter.errors import UserError
from rter.models import NETWORKS, ROUTERS
from rter.models.build import build_model
from rter.models.classifier import Normalize, RobustClassifier
from rter.models.initial import load_initial
from rter.settings import make_config
from torch import Tensor, nn

from moe_kernels import ExpertCondConv2d, attack_mode
from moe_kernels.testing.networks import ResNet18, randomize_statistics

SMALL: dict[str, dict[str, int]] = {"wrn": {"depth": 10, "width": 4}, "vit": {"depth": 1, "width": 8}}


def images(channels: int = 3, size: int = 8) -> Data:
    split = Split(torch.randint(256, (6, channels, size, size), dtype=torch.uint8), torch.randint(5, (6,)))
    return Data(split, split, 5)


def tiny(model: str = "resnet18", data: Data | None = None, **settings: Any) -> RobustClassifier:
    config = make_config(**({"model": model, "width": 4, "num_experts": 2} | SMALL.get(model, {}) | settings))
    return build_model(config, data or images()).eval()


@pytest.mark.parametrize("model", NETWORKS)
def test_networks_can_be_trained_and_attacked(model: str) -> None:
    data = images()
    classifier = tiny(model, data)
    x = data.train.x.requires_grad_()
    y = classifier(x)
    assert y.shape == (6, 5)
    y.logsumexp(1).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in classifier.moe.experts.parameters())
    with attack_mode(classifier):
        (gradient,) = torch.autograd.grad(classifier(x).logsumexp(1).sum(), x)
    torch.testing.assert_close(gradient, x.grad)
    alone = [classifier(x, routing=classifier.route(x).fixed(e)) for e in range(2)]
    chosen = classifier.route(x).experts[:, 0].tolist()
    torch.testing.assert_close(y, torch.stack([alone[e][i] for i, e in enumerate(chosen)]))


@pytest.mark.parametrize("shared_stages", [0, 2])
def test_convolutions_with_several_kernels(shared_stages: int) -> None:
    classifier = tiny(kernels=3, shared_stages=shared_stages)
    layers = [m for m in classifier.modules() if isinstance(m, ExpertCondConv2d)]
    assert [len(layer.weight) for layer in layers] == 2 * (8 - 2 * shared_stages) * [2] + 4 * shared_stages * [1]
    assert {layer.weight.shape[1] for layer in layers} == {3}
    classifier(images().train.x).logsumexp(1).sum().backward()
    assert all(layer.router.weight.grad is not None for layer in layers)


@pytest.mark.parametrize("router", ROUTERS)
def test_routers_route_each_image_by_itself(router: str) -> None:
    data = images()
    classifier = tiny("small-conv", data, router=router, num_experts=3)
    logits = classifier.route(data.train.x).logits
    assert logits.shape == (6, 3)
    torch.testing.assert_close(classifier.route(data.train.x[2:3]).logits, logits[2:3])
    assert not list(classifier.moe.router.parameters())[-1].any()


def test_networks_have_their_own_default_sizes() -> None:
    assert [make_config(model=m).width for m in NETWORKS] == [16, 64, 64, 160, 384]
    assert [make_config(method="nine-experts", model=m).width for m in ("small-conv", "resnet18")] == [8, 64]
    assert (make_config(model="wrn").depth, make_config(model="vit").depth) == (28, 12)
    assert make_config(model="wrn", width=32).width == 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "wrn", "depth": 11}, "model wrn: depth must be 10, 16, 22, 28 or another 6 n + 4, got 11"),
        ({"model": "vit", "patch": 3}, "model vit: image_size must be a multiple of patch"),
        ({"model": "cnn"}, "model must be one of small-conv, resnet18, preact-resnet18, wrn, vit, got 'cnn'"),
        ({"router": "lottery"}, "router must be one of linear, conv, mlp, pooled, got 'lottery'"),
        ({"kernels": 0}, "kernels must be above 0, got 0"),
        ({"kernels": 2, "model": "wrn"}, "kernels must be 1 for wrn, got 2"),
        (
            {"kernels": 2, "model": "resnet18", "init": "net.pt"},
            "kernels must be 1 with init, whose convolutions have one kernel, got 2",
        ),
        ({"patch": 0}, "patch must be above 0, got 0"),
        (
            {"normalize": "0.5"},
            "normalize must be data, or means/deviations as 0.49,0.48,0.45/0.25,0.24,0.26, got '0.5'",
        ),
        ({"normalize": "0.5/0"}, "normalize must have finite means and deviations above 0, got '0.5/0'"),
        ({"normalize": "0.5,0.5/1"}, "normalize must give one number or 3, one per channel, got '0.5,0.5/1'"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        tiny(**settings)
    assert str(error.value).startswith(message)


def test_normalises_by_the_given_statistics() -> None:
    classifier, x = tiny(normalize="0.1,0.2,0.3/0.5"), torch.rand(2, 3, 8, 8)
    expected = (x - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / 0.5
    torch.testing.assert_close(classifier.normalize(x), expected)


# weights of other code


class PublicMoE(nn.Module):
    """The public RT-ER code's mixture: a list of experts and a gate on the flattened image; returns top-1's logits."""

    def __init__(self, num_experts: int = 2, classes: int = 5, size: int = 8) -> None:
        super().__init__()
        nets = (ResNet18(classes, 3, 4) for _ in range(num_experts))
        self.experts = nn.ModuleList(nn.Sequential(OrderedDict(net=net)) for net in nets)
        self.router = nn.Module()
        self.router.gate = nn.Linear(3 * size * size, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router.gate(x.flatten(1)).argmax(1).tolist()
        return torch.cat([self.experts[e](row) for e, row in zip(chosen, x.split(1), strict=True)])


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_public_codes_mixture(tmp_path: Path, prefix: str, wrapped: bool) -> None:
    public = randomize_statistics(PublicMoE()).eval()
    assert {"experts.1.net.layer4.1.bn2.running_var", "router.gate.weight"} < public.state_dict().keys()
    state = {prefix + key: value for key, value in public.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "moe.pt")
    data = images()
    classifier = tiny(data=data, gate="hard")
    load_initial(classifier, tmp_path / "moe.pt")
    torch.testing.assert_close(classifier(data.train.x), public(classifier.normalize(data.train.x)))


def test_the_public_codes_dual_model(tmp_path: Path) -> None:
    public = nn.ModuleDict({name: randomize_statistics(PublicMoE()).eval() for name in ("Smoe", "Rmoe")})
    torch.save(public.state_dict(), tmp_path / "dual.pt")
    data = images()
    for method, alpha in (("dual", 0.3), ("rt-er", 1.0)):  # only F_R if there is no F_S
        classifier = tiny(data=data, gate="hard", method=method, dual_alpha=alpha)
        load_initial(classifier, tmp_path / "dual.pt")
        x = classifier.normalize(data.train.x)
        expected = (1 - alpha) * public["Smoe"](x) + alpha * public["Rmoe"](x)
        torch.testing.assert_close(classifier(data.train.x), expected)


@pytest.mark.parametrize("classes", [5, 1000])
def test_one_network_for_all_experts(tmp_path: Path, classes: int) -> None:
    net = randomize_statistics(ResNet18(classes, 3, 4)).eval()
    renamed = {key.replace("linear", "fc").replace("shortcut", "downsample"): v for key, v in net.state_dict().items()}
    safetensors.torch.save_file(renamed, tmp_path / "net.safetensors")
    data = images()
    classifier = tiny(data=data)
    before = classifier.moe.experts.linear.weight.clone()
    load_initial(classifier, tmp_path / "net.safetensors")
    for state in classifier.moe.experts.state_dicts():
        own = {key: value for key, value in state.items() if not key.startswith("linear")}
        torch.testing.assert_close(own, {key: net.state_dict()[key] for key in own}, rtol=0, atol=0)
    kept = torch.equal(classifier.moe.experts.linear.weight, before)
    assert kept == (classes == 1000)
    if not kept:
        x, route = data.train.x, classifier.route(data.train.x).fixed(1)
        torch.testing.assert_close(classifier(x, routing=route), net(classifier.normalize(x)))


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_files_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    state = PublicMoE().state_dict()
    less = {k: v for k, v in state.items() if k != "experts.1.net.bn1.bias"}
    contents = {
        "gone": "cannot read",
        "evil": "must be a file of tensors and nothing else",
        "module": r"nothing else: it holds a torch.nn.modules.linear.Linear: save model.state_dict\(\)$",
        "cut": "must be a file of tensors",
        "cut.safetensors": "must be a file of tensors",
        "list": "must hold a state dict of tensors",
        "three": r"does not fit the model: it holds the experts \[0, 1, 2\], the model has 2",
        "less": r"experts\[1\] must be a state dict .*; missing: bn1.bias",
        "router": r"does not fit the model: router must be .*\[2, 192\].*, got .*\[2, 7\]",
        "other": r"experts\[0\] must be a state dict .*; unexpected: w",
    }
    saved = {
        "evil": {"w": Malicious(tmp_path / "ran")}, "module": nn.Linear(2, 2), "list": [1],
        "three": PublicMoE(3).state_dict(), "less": less,
        "router": state | {"router.gate.weight": torch.zeros(2, 7)}, "other": {"w": torch.zeros(1)},
    }  # fmt: skip
    for name, value in saved.items():
        torch.save(value, tmp_path / name)
    for name in ("cut", "cut.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / "less").read_bytes()[:3000])
    classifier = tiny()
    for name, message in contents.items():
        with pytest.raises(UserError, match=message) as error:
            load_initial(classifier, tmp_path / name)
        assert "\n" not in str(error.value), error.value
    assert not (tmp_path / "ran").exists()


# the whole command


def write_cifar10(folder: Path) -> None:
    """Four images of noise in each of CIFAR-10's binary batches."""
    place = folder / "cifar-10-batches-bin"
    place.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        records = torch.randint(256, (4, 3073), dtype=torch.uint8)
        records[:, 0] %= 10
        (place / f"{name}.bin").write_bytes(records.numpy().tobytes())


ON_CIFAR10 = "--data cifar10 --model resnet18 --num-experts 2 --held-out 4 --batch-size 8 --attack-steps 1 --eps 8/255"
WEAK = ["--suite", "quick", "--steps", "1", "--restarts", "1"]


def test_resnets_on_cifar10s_format(tmp_path: Path) -> None:
    """A run on 3x32x32 images in CIFAR-10's binary format, evaluated on its test batch."""
    write_cifar10(tmp_path)
    torch.save(PublicMoE().state_dict(), tmp_path / "moe.pt")
    run = tmp_path / "run"
    settings = [*ON_CIFAR10.split(), "--width", "2", "--router", "conv", "--epochs", "1", "--data-dir", str(tmp_path)]
    assert main(["train", "--out", str(run), *settings]) == 0
    assert main(["evaluate", str(run), *WEAK]) == 0
    report = (run / "report.json").read_text()
    assert '"split": "test"' in report and '"held_out": 4' in report
    assert main(["evaluate", str(run), *WEAK, "--images", "3"]) == 0
    assert '"held_out": 3' in (run / "report.json").read_text()
    assert main(["train", "--out", str(tmp_path / "other"), *settings, "--init", str(tmp_path / "moe.pt")]) == 2
    assert not (tmp_path / "other").exists()


def test_a_public_model_is_evaluated_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cifar10(tmp_path)
    public = randomize_statistics(PublicMoE(classes=10, size=32)).eval()
    torch.save(public.state_dict(), tmp_path / "moe.pt")
    run = tmp_path / "run"
    train = ["train", *ON_CIFAR10.split(), "--width", "4", "--gate", "hard", "--epochs", "0", "--out", str(run)]
    train += ["--data-dir", str(tmp_path), "--init", str(tmp_path / "moe.pt"), "--normalize", "0.5/0.2"]
    assert main(train) == 0
    assert (run / "metrics.jsonl").read_text() == "" and not (run / "metrics.csv").exists()
    for weights in ("last", "best"):
        assert main(["evaluate", str(run), "--weights", weights, *WEAK]) == 0
    assert main(["report", str(run)]) == 0 and "learning" not in (run / "report.md").read_text()
    report, data = json.loads((run / "report.json").read_text()), load_data("cifar10", 4, 0, str(tmp_path))
    said = public((data.test.x - 0.5) / 0.2).argmax(1)
    assert report["sa"] == (said == data.test.y).double().mean() and report["train_seconds"] == 0
    capsys.readouterr()
    assert main([*train, "--resume"]) == 0 and "finished already" in capsys.readouterr().out


def test_a_constant_channel_is_not_rescaled() -> None:
    """Such as the green channel of pictures in red and blue: its deviation of 0 would make every logit NaN."""
    images = torch.rand(8, 3, 4, 4)
    images[:, 1] = 40 / 255
    normalize = Normalize(images)
    assert normalize(images)[:, 1].abs().max() < 1e-5
    torch.testing.assert_close(normalize(images)[:, [0, 2]].std((0, 2, 3)), torch.ones(2))
