"""Small models of a user's own, their images, and the least work to evaluate them, that several test files share."""

from typing import Any

import pytest
import torch
from rter import Report
from torch import Tensor, nn

from moe_kernels import RobustMoE

WEAK: dict[str, Any] = {"eps": "1/50", "steps": 3, "restarts": 2, "queries": 20, "batch_size": 8}


def cnn(classes: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, classes)
    )


def mixture() -> nn.Module:
    """A mixture of plain modules, inside another module."""
    torch.manual_seed(0)
    router = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    return nn.Sequential(nn.Tanh(), RobustMoE.from_experts([cnn() for _ in range(3)], router, gate="hard"))


def transformer() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=4, **sizes)
    return transformers.ViTForImageClassification(config)


MODELS = {"cnn": cnn, "mixture": mixture, "transformer": transformer}


def images(model: nn.Module, count: int = 20) -> tuple[Tensor, Tensor]:
    """Images and the labels that the model gives them, except for one wrong label."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 3, 8, 8, generator=generator)
    with torch.no_grad():
        y = getattr(out := model.eval()(x), "logits", out).argmax(1)
    y[0] = (y[0] + 1) % 4
    model.train()
    return x, y


def timeless(report: Report) -> dict[str, Any]:
    results = [{**result, "seconds": 0} for result in report.figures["attack_results"]]
    return report.figures | {"attack_results": results}
