"""RobustMoE is saved and loaded by huggingface_hub's mixin, in a local folder, and works without that package."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_kernels import RobustMoE
from moe_kernels.nn import hub


def test_a_saved_layer_is_loaded(tmp_path: Path) -> None:
    moe = RobustMoE(6, 10, 3, 1, activation="swiglu", bias=False, gate="sigmoid", device="cpu", dtype=torch.float64)
    moe.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "float64" and config["activation"] == "swiglu" and "device" not in config
    again = RobustMoE.from_pretrained(tmp_path)
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(again(x), moe(x)) and repr(again.train()) == repr(moe)


@pytest.mark.parametrize(
    ("moe", "what"),
    [
        (RobustMoE(4, 4, 2, router=nn.Linear(4, 2)), "a router of its own"),
        (RobustMoE.from_experts([nn.Linear(4, 4), nn.Linear(4, 4)], nn.Linear(4, 2)), r"experts of its own"),
    ],
)
def test_a_layer_that_cannot_be_saved_says_why(moe: RobustMoE, what: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"needs a layer made from plain arguments, got one with {what}"):
        moe.save_pretrained(tmp_path)


def test_the_package_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    spec = importlib.util.spec_from_file_location("hub_alone", hub.__file__)
    assert spec is not None and spec.loader is not None
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert not hasattr(alone.HubMixin, "save_pretrained")
    assert type("Layer", (nn.Module, alone.HubMixin), {})().training
