"""Every family of mixtures in the installed transformers gives the same results by this package's operators as by its
own code."""

import copy
import importlib
import importlib.util
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from operators_run import operators
from torch import Tensor, nn

from moe_kernels.testing import InOrder, Source, assert_matches
from moe_kernels.testing.saved import saved_bytes

T, H, WIDTH, E, K = 13, 6, 5, 4, 2
CONFIG = {
    **dict.fromkeys(["hidden_size", "moe_hidden_size"], H),
    **dict.fromkeys(["intermediate_size", "moe_intermediate_size"], WIDTH),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], E),
    **dict.fromkeys(["hidden_act", "hidden_activation"], "silu"),
    **dict.fromkeys(["mlp_gate_softcap", "mlp_up_softcap"], 2.0),
    "mlp_hidden_act": "relu2",
    "moe_latent_size": None,
    "swiglu_limit": 0.7,
    "swiglu_alpha": 1.702,
    "post_norm_eps": 1e-6,
}


def families() -> list[tuple[str, str]]:
    """(module, class) of all experts that use transformers' interface for experts."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None, "make installs transformers for the tests"
    found = []
    for path in sorted(Path(spec.origin).parent.glob("models/*/modeling_*.py")):
        for name in re.findall(r"^@use_experts_implementation.*\nclass (\w+)", path.read_text(), re.MULTILINE):
            found.append((f"transformers.models.{path.parent.name}.{path.stem}", name))
    return found


def experts_of(module: str, name: str, dtype: torch.dtype, **config: Any) -> nn.Module:
    settings = SimpleNamespace(**CONFIG | config, _experts_implementation="eager")
    experts = getattr(importlib.import_module(module), name)(settings)
    source = Source(torch.float64)
    for p in experts.parameters():
        p.data = source.randn(*p.shape).to(torch.bfloat16).to(dtype)
    return experts


def rows(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, expert ids (the last expert gets no rows), and weights that are exact in every dtype."""
    source = Source(torch.float64, seed=1)
    x, weights = (t.to(torch.bfloat16).to(dtype) for t in (source.randn(T, H), source.rand(T, K)))
    return x, torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)]), weights


def results(experts: nn.Module, implementation: str, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of the hidden states, the weights and all parameters that are not frozen."""
    experts.config._experts_implementation = implementation
    leaves = [x.detach().requires_grad_(), weights.detach().requires_grad_()]
    y = experts(leaves[0], index, leaves[1])
    grad = Source(torch.float64, seed=2).randn(*y.shape).to(y.dtype)
    leaves += [p for p in experts.parameters() if p.requires_grad]
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def check(experts: nn.Module, dtype: torch.dtype, index: Tensor | None = None) -> None:
    x, own, weights = rows(dtype)
    index = own if index is None else index
    out = results(experts, "moe_kernels", x, index, weights)
    with InOrder():
        low = results(experts, "eager", x, index, weights)
    exact = results(copy.deepcopy(experts).double(), "eager", x.double(), index, weights.double())
    assert_matches(out, low, exact, dtype)


@pytest.fixture(autouse=True, params=["all"])
def registered(request: pytest.FixtureRequest) -> str:
    from moe_kernels.integrations import transformers

    transformers.register(request.param)
    return request.param


@pytest.mark.filterwarnings("error:.*without moe_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("module", "name"), families())
@pytest.mark.parametrize("registered", ["activations", "all"], indirect=True)
def test_every_family_equals_its_own_code(module: str, name: str, dtype: torch.dtype) -> None:
    check(experts_of(module, name, dtype), dtype)


QWEN = ("transformers.models.qwen2_moe.modeling_qwen2_moe", "Qwen2MoeExperts")
GPT_OSS = ("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts")
NEMOTRON = ("transformers.models.nemotron_h.modeling_nemotron_h", "NemotronHExperts")
NORMED = ("transformers.models.muse_spark.modeling_muse_spark", "MuseSparkExperts")


@pytest.mark.parametrize("all_foreign", [False, True])
@pytest.mark.parametrize("family", [QWEN, GPT_OSS, NEMOTRON, NORMED])
@pytest.mark.parametrize("registered", ["activations", "all"], indirect=True)
def test_slots_of_other_processes_experts_add_nothing(family: tuple[str, str], all_foreign: bool) -> None:
    experts = experts_of(*family, torch.float32)
    x, index, weights = rows(torch.float32)
    foreign = torch.zeros(T, K, dtype=torch.bool)
    foreign[::3, 0], foreign[4:6], foreign[:] = True, True, foreign | all_foreign
    out = results(experts, "moe_kernels", x, torch.where(foreign, E + torch.arange(K), index), weights)
    # An expert whose weight is 0 gets no gradient; only the weight itself has one.
    index, weights = index.masked_fill(foreign, 0), weights.masked_fill(foreign, 0)
    with InOrder():
        low = results(experts, "eager", x, index, weights)
    exact = results(experts.double(), "eager", x.double(), index, weights.double())
    low, exact = ((*r[:2], r[2].masked_fill(foreign, 0), *r[3:]) for r in (low, exact))
    assert_matches(out, low, exact, torch.float32)
    assert not out[0][foreign.all(1)].any()


def test_slots_of_other_processes_experts_are_those_of_transformers_own_code() -> None:
    _, index, _ = rows(torch.float32)
    index[::3, 0], index[5] = E, E
    check(experts_of(*QWEN, torch.float32), torch.float32, index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "relu", "quick_gelu", "xielu", "prelu"])
def test_every_activation(act: str, dtype: torch.dtype) -> None:
    check(experts_of(*QWEN, dtype, hidden_act=act).to(dtype), dtype)


def test_known_activations_are_the_operators_own() -> None:
    from moe_kernels.integrations.transformers import activation_of

    names = {act: activation_of(experts_of(*QWEN, torch.float32, hidden_act=act)) for act in ("silu", "gelu", "swish")}
    assert names == {"silu": "swiglu", "gelu": "geglu", "swish": "swiglu"}
    assert activation_of(experts_of(*NEMOTRON, torch.float32)) == "relu2"
    assert callable(activation_of(experts_of(*GPT_OSS, torch.float32)))
    assert callable(activation_of(experts_of(*QWEN, torch.float32, hidden_act="relu")))


@pytest.mark.parametrize("registered", ["activations", "all"], indirect=True)
@pytest.mark.parametrize("family", [QWEN, GPT_OSS])
def test_frozen_experts_cost_no_weight_gradient(family: tuple[str, str], registered: str) -> None:
    experts = experts_of(*family, torch.float32)
    experts.config._experts_implementation = "moe_kernels"
    x, index, weights = rows(torch.float32)

    def step() -> None:
        experts(x.requires_grad_(), index, weights.requires_grad_()).sum().backward()

    sums = {"expert_linear_weight_grad"} | ({"expert_sum"} if experts.has_bias else set())
    assert sums <= operators(step)
    trained = saved_bytes(lambda: experts(x, index, weights), apart_from=experts)
    experts.requires_grad_(False)
    frozen = operators(step)
    assert "expert_linear" in frozen and not sums & frozen
    kept = saved_bytes(lambda: experts(x, index, weights), apart_from=experts)
    # which the gradient of the first map's weight reads, and the map that is computed again
    assert trained - kept == (x.nbytes if registered == "activations" else 0)


@pytest.mark.parametrize("registered", ["activations", "all"], indirect=True)
def test_under_autocast_the_family_equals_its_own_code() -> None:
    experts = experts_of(*GPT_OSS, torch.float32)
    x, index, weights = rows(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = results(experts, "moe_kernels", x, index, weights)
        with InOrder():
            low = results(experts, "eager", x, index, weights)
    exact = results(experts.double(), "eager", x.double(), index, weights.double())
    assert [y.dtype for y in out] == [y.dtype for y in low]
    assert_matches(out, low, exact, torch.bfloat16)


def test_without_a_kernel_the_models_own_code_runs_with_one_warning() -> None:
    experts = experts_of(*QWEN, torch.float32)
    experts.gate_up_proj.data = experts.gate_up_proj.data.half()
    experts.down_proj.data = experts.down_proj.data.half()
    x, index, weights = rows(torch.float16)
    experts.config._experts_implementation = "moe_kernels"
    said = pytest.warns(RuntimeWarning, match="Qwen2MoeExperts runs without moe_kernels: the weights are .*float16")
    with said, pytest.raises(RuntimeError):  # raised by their own code, too
        experts(x.float(), index, weights)
    with warnings.catch_warnings(), pytest.raises(RuntimeError):
        warnings.simplefilter("error", RuntimeWarning)
        experts(x.float(), index, weights)
    results(experts, "moe_kernels", x, index, weights)


def test_a_weight_that_changes_before_the_backward_is_an_error() -> None:
    experts = experts_of(*GPT_OSS, torch.float32).requires_grad_(False)
    experts.config._experts_implementation = "moe_kernels"
    x, index, weights = rows(torch.float32)
    y = experts(x.requires_grad_(), index, weights)
    experts.gate_up_proj_bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
