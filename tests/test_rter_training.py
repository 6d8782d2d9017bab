"""Learning rates, the running mean of the weights, precision, clipping, TensorBoard, and losses that are not finite."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rter.__main__ import main
from rter.checkpoint import load_tensors
from rter.data.load import load_data
from rter.errors import UserError
from rter.methods.step import Step
from rter.methods.update import update
from rter.models.build import build_model
from rter.optimisation import RunningMean, finish_gradients, make_optimizer, set_rate
from rter.settings import make_config
from rter.train import train
from torch import Tensor, nn

from moe_kernels import PGD

TINY: dict[str, Any] = {"num_experts": 2, "width": 2, "attack_steps": 1, "held_out": 60, "batch_size": 500, "epochs": 2}


def rates(total: int, **settings: Any) -> list[float]:
    config = make_config(lr=0.1, **settings)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    result = []
    for index in range(total):
        set_rate(optimizer, config, index, total)
        result.append(optimizer.param_groups[0]["lr"])
    return result


@pytest.mark.parametrize("total", [1, 2, 7, 600])
@pytest.mark.parametrize("rule", [torch.optim.AdamW, torch.optim.SGD])
def test_one_cycle_is_bitwise_torchs(total: int, rule: type[torch.optim.Optimizer]) -> None:
    config = make_config(lr=0.015)
    ours, theirs = (rule([nn.Parameter(torch.zeros(1))], lr=0.1, **momentum) for momentum in _momenta(rule))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(theirs, max_lr=0.015, total_steps=total)
    for index in range(total):
        set_rate(ours, config, index, total)
        for name in ("lr", "betas", "momentum"):
            assert ours.param_groups[0].get(name) == theirs.param_groups[0].get(name)
        theirs.step()
        if index + 1 < total:
            scheduler.step()


def _momenta(rule: type[torch.optim.Optimizer]) -> list[dict[str, float]]:
    return [{"momentum": 0.9} if rule is torch.optim.SGD else {}] * 2


def test_schedules() -> None:
    assert rates(9, schedule="cyclic", cycle_steps=2) == pytest.approx([0.05, 0.075, 0.1, 0.075] * 2 + [0.05])
    assert rates(8, schedule="multi-step", epochs=4, drops="1,3") == pytest.approx([0.1] * 2 + [0.01] * 4 + [0.001] * 2)
    assert rates(4, schedule="cosine") == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], rel=1e-5)
    assert rates(3, schedule="constant") == [0.1] * 3


def test_the_running_mean_follows_its_formula() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    mean = RunningMean(model, 0.3)  # type: ignore[arg-type]
    expected = 0.0
    for index in range(8):
        nn.init.constant_(model.weight, index + 1.0)
        mean.update(model, index)
        decay = min(0.3, (1 + index) / (10 + index))
        expected = decay * expected + (1 - decay) * (index + 1)
        assert mean.model.weight.item() == pytest.approx(expected)


def test_the_running_mean_is_what_is_saved(tmp_path: Path) -> None:
    train(make_config(method="standard", ema=0.9, **TINY), tmp_path / "mean")
    train(make_config(method="standard", **TINY), tmp_path / "plain")
    state = load_tensors(tmp_path / "mean" / "resume.safetensors")
    last, plain = (load_tensors(tmp_path / run / "last.safetensors") for run in ("mean", "plain"))
    for name in last:
        assert torch.equal(last[name], state[f"ema/{name}"]) and torch.equal(plain[name], state[f"model/{name}"])
    assert any(not torch.equal(last[name], plain[name]) for name in last)


def test_bf16_trains_attack_and_model_but_not_images_and_weights() -> None:
    config = make_config(method="rt-er", amp="bf16", **TINY)
    data = load_data("digits", 60, 0)
    model = build_model(config, data)
    seen: list[torch.dtype] = []
    model.moe.experts.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    optimizer = make_optimizer(config, model)
    step = Step(model, config, 0, epoch=0)
    terms = update(step, optimizer, data.train[:32])
    assert set(seen) == {torch.bfloat16} and len(seen) >= 2
    assert [x.dtype for x in step.found] == [torch.float32]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(term.isfinite() for term in terms.values())


def test_evaluation_is_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attacked(attack: PGD, x: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
        enabled.append(torch.is_autocast_enabled("cpu"))
        return x

    enabled: list[bool] = []
    monkeypatch.setattr(PGD, "__call__", attacked)
    train(make_config(method="pgd-at", amp="bf16", **TINY | {"epochs": 1}), tmp_path / "run")
    assert enabled == [True, True, True, False]  # three steps, then the evaluation


@pytest.mark.parametrize("there", [True, False])
def test_a_cpu_without_bf16_is_warned_of(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("moe_kernels._torch.cpu_multiplies_bf16", lambda: there)
    train(make_config(method="standard", amp="bf16", **TINY | {"epochs": 1}), tmp_path / "run", device="cpu")
    assert ("this CPU has no instructions for bfloat16" in capsys.readouterr().err) is not there


def test_the_gradient_is_clipped() -> None:
    model = nn.Linear(3, 1)
    (100 * model(torch.ones(1, 3))).sum().backward()
    finish_gradients(list(model.parameters()), None, clip_norm=0.5)
    assert torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item() == pytest.approx(0.5)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = make_config(method="pgd-at", **TINY), tmp_path / "run"
    steps = 0

    def poisoned(step: Step, x: Tensor) -> dict[str, Tensor]:
        nonlocal steps
        steps += 1
        weight = next(step.model.parameters()).flatten()[0]
        if where == "loss":
            return {"poison": weight / 0 if steps == 5 else 0 * weight}
        return {"poison": (weight - weight).abs().sqrt() if steps == 5 else 0 * weight}  # its slope at 0 is infinite

    monkeypatch.setattr(Step, "balance", poisoned)
    with pytest.raises(UserError, match=rf"the {where} became (nan|-?inf) at step 4: .*nan-batch\.safetensors"):
        train(config, run, save_every=0)
    batch = load_tensors(run / "nan-batch.safetensors")
    assert batch.keys() == {"x", "y", "rows", "x_adv.0", "term.adversarial", "term.poison"} and len(batch["y"]) == 500
    assert batch["term.adversarial"] > 0 and batch["term.poison"].isfinite() == (where == "gradient")
    data = load_data("digits", 60, 0).train[batch["rows"]]
    assert torch.equal(data.x, batch["x"]) and torch.equal(data.y, batch["y"])
    assert 0 < (batch["x_adv.0"] - batch["x"]).abs().max() <= config.eps + 1e-6
    state = load_tensors(run / "resume.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values()) and len(state["records/loss"]) == 1
    assert not any(path.name.startswith(".") for path in run.iterdir())


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(make_config(method="standard", **TINY), tmp_path / "run", tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.step for event in events.Scalars("ra")] == [2]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["train", "--out", str(tmp_path / "other"), "--tensorboard"]) == 2
    assert "--tensorboard needs a package: pip install tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
