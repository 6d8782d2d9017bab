"""Two processes compute what one does: the draws and the load are those of the joint batch, the sums are joined."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rter.__main__ import main
from rter.checkpoint import load_tensors, read_lines
from rter.config import Config
from rter.data import load_data
from rter.distributed import Share
from rter.methods.step import Step, make_attack
from rter.models import build_model

SETTINGS = ["--epochs", "1", "--batch-size", "301", "--width", "4", "--attack-steps", "3", "--held-out", "60",
            "--eval-every", "1", "--ema", "0.9"]  # fmt: skip


def test_torchrun_is_one_process_to_rounding(tmp_path: Path) -> None:
    """RT-ER, five steps, of which three explore; 150 and 151 rows."""
    one, two = tmp_path / "one", tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    subprocess.run([*launch, "rter", "train", "--out", str(two), *SETTINGS], check=True)
    assert main(["train", "--out", str(one), *SETTINGS]) == 0
    for name in ("resume.safetensors", "last.safetensors"):
        joined, whole = (load_tensors(run / name) for run in (two, one))
        assert joined.keys() == whole.keys()
        for key, tensor in whole.items():
            assert (joined[key] - tensor).abs().max() <= 1e-4 * tensor.abs().max(), key
    ((metrics,), (expected,)) = (read_lines(run / "metrics.jsonl") for run in (two, one))
    assert metrics.keys() == expected.keys()
    assert all(metrics[name] == pytest.approx(expected[name], rel=1e-4) for name in ("loss", "kl", "balance"))
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("copies", [1, 2])
def test_a_share_draws_as_the_joint_batch_does(norm: str, copies: int) -> None:
    config = Config(num_experts=3, width=2, norm=norm)
    data = load_data("digits", 60, 0)
    model, batch = build_model(config, data), data.train[:7]

    def draws(share: Share) -> tuple[torch.Tensor, torch.Tensor]:
        step = Step(model, config, 3, epoch=0, share=share)
        own = batch[share.start : share.stop]
        attack = make_attack(model, config, 0.2, 0, "attack", 3, share=share)
        start = attack(own.x.repeat(copies, 1, 1, 1), own.y.repeat(copies))
        route = step.own_route(own.x)
        assert route is not None
        return start.unflatten(0, (copies, len(own))), route.experts

    whole, parts = draws(Share.whole(7)), [draws(share) for share in (Share(0, 3, 7), Share(3, 7, 7))]
    assert torch.equal(torch.cat([start for start, _ in parts], dim=1), whole[0])
    assert torch.equal(torch.cat([route for _, route in parts]), whole[1])
