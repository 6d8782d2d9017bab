"""What bf16 costs in accuracy on scikit-learn's digits: `python benchmarks/bf16_attack.py [--seeds N]`.

Trains each model twice, in fp32 and with bf16 autocast (in its attack too), and attacks both in fp32. Also attacks the
fp32 model with bf16 gradients, and entirely in bf16, where the attack judges its success by bf16 logits. What an attack
finds is always evaluated in fp32.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rter.checkpoint import load_weights
from rter.config import Config
from rter.data.load import load_data
from rter.data.split import Data
from rter.models.build import build_model
from rter.settings import make_config
from rter.train import train
from torch import Tensor, nn

from moe_kernels.attacks import APGD

STEPS = 20  # of the APGD that measures robust accuracy
MODELS: dict[str, dict[str, Any]] = {
    "RT-ER, 4 small networks": {"method": "rt-er", "epochs": 8},
    "PGD-AT, a ResNet-18 of width 16": {
        "method": "pgd-at",
        "model": "resnet18",
        "width": 16,
        "num_experts": 1,
        "epochs": 5,
        "attack_steps": 3,
    },
}


def trained(settings: dict[str, Any], amp: str, seed: int, folder: Path) -> tuple[nn.Module, Config, Data]:
    config = make_config(amp=amp, seed=seed, **settings)
    run = folder / f"{config.model}-{amp}-{seed}"
    train(config, run)
    data = load_data(config.data, config.held_out, config.seed, config.data_dir, config.image_size)
    model = build_model(config, data)
    load_weights(run / "last.safetensors", model)
    return model.eval(), config, data


class Bf16Gradients(nn.Module):
    """fp32 logits with bf16 gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            exact = self.model(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = self.model(x).float()
        return rounded + (exact - rounded).detach()


def robust_accuracy(model: nn.Module, attacked: nn.Module, data: Data, eps: float) -> float:
    """Percentage of the test images that the model classifies correctly after APGD-CE on `attacked`."""
    x_adv = APGD(attacked, eps, steps=STEPS, seed=0)(data.test.x, data.test.y)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return 100 * (model(x_adv).argmax(1) == data.test.y).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=2)
    seeds = range(parser.parse_args().seeds)
    print("| | seed | fp32 | trained in bf16 | attacked with bf16 gradients | attacked in bf16 |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for title, settings in MODELS.items():
            rows = []
            for seed in seeds:
                model, config, data = trained(settings, "none", seed, Path(name))
                other, _, _ = trained(settings, "bf16", seed, Path(name))
                row = [robust_accuracy(model, model, data, config.eps), robust_accuracy(other, other, data, config.eps)]
                row.append(robust_accuracy(model, Bf16Gradients(model), data, config.eps))
                with torch.autocast("cpu", torch.bfloat16):
                    row.append(robust_accuracy(model, model, data, config.eps))
                rows.append(row)
                print(f"| {title} | {seed} | {' | '.join(f'{accuracy:.1f}' for accuracy in row)} |", flush=True)
            print(f"| {title} | minus fp32 | | {' | '.join(cost(rows, i) for i in (1, 2, 3))} |", flush=True)


def cost(rows: list[list[float]], i: int) -> str:
    """The mean difference from fp32 over the seeds, with its standard error."""
    differences = [row[i] - row[0] for row in rows]
    error = f" +- {stdev(differences) / len(rows) ** 0.5:.1f}" if len(rows) > 1 else ""
    return f"{mean(differences):+.1f}{error}"


if __name__ == "__main__":
    main()
