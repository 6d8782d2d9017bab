"""Whole models of transformers with this package's operators in their mixtures: attacks, prompts, routers, loading."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from operators_run import operators
from torch import Tensor, nn

from moe_kernels import PGD, RobustMoE, attack_mode
from moe_kernels.testing import InOrder, Source, assert_matches
from moe_kernels.testing.saved import saved_bytes


@pytest.fixture(autouse=True)
def registered() -> None:
    from moe_kernels.integrations import transformers

    transformers.register()


TINY = {
    "vocab_size": 17,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 12, "head_dim": 8},
    "Olmoe": {"num_experts": 4},
    "DeepseekV3": {
        **{"n_routed_experts": 8, "moe_intermediate_size": 12, "n_group": 4, "topk_group": 2, "n_shared_experts": 1},
        **{"first_k_dense_replace": 1, **LATENT},
    },
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "GraniteMoe": {"num_local_experts": 4},
}


def model_of(family: str, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    settings = getattr(transformers, f"{family}Config")(**TINY | MODELS[family] | config)
    model = getattr(transformers, f"{family}ForCausalLM")(settings).to(torch.bfloat16).to(dtype).eval()
    for name, p in model.named_parameters():  # routes without near ties, gates with a gradient
        if p.ndim > 1:
            p.data = (p.data * 10).to(dtype)
        elif "bias" in name:
            p.data = torch.randn(p.shape).to(dtype)
    return model


def prompt(dtype: torch.dtype = torch.float32, samples: int = 3) -> Tensor:
    return Source(torch.float64, seed=3).randn(samples, 5, TINY["hidden_size"]).to(torch.bfloat16).to(dtype)


def of_model(model: nn.Module, implementation: str, x: Tensor, routing: Any = None) -> tuple[Tensor, ...]:
    """Logits, and the gradients of the embeddings and of every parameter that has one."""
    from moe_kernels.integrations.transformers import SoftPrompt

    model.set_experts_implementation(implementation)
    x = x.detach().requires_grad_()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    y = SoftPrompt(model)(x, routing)
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y).cumsum(1) / 10, allow_unused=True)
    return y.detach(), *(g for g in grads if g is not None)


@pytest.mark.filterwarnings("error:.*without moe_kernels")
@pytest.mark.parametrize("family", MODELS)
def test_a_model_equals_itself_with_its_own_code(family: str) -> None:
    model = model_of(family)
    out, low = (of_model(model, name, prompt()) for name in ("moe_kernels", "eager"))
    exact = of_model(model.double(), "eager", prompt(torch.float64))
    assert_matches(out, low, exact, torch.float32)


@pytest.mark.parametrize("family", MODELS)
def test_a_model_in_bf16_equals_itself_under_one_route(family: str) -> None:
    from moe_kernels.integrations.transformers import SoftPrompt

    model = model_of(family, torch.bfloat16)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        routing = SoftPrompt(model).route(prompt(torch.bfloat16))
    out, low = (of_model(model, name, prompt(torch.bfloat16), routing) for name in ("moe_kernels", "eager"))
    exact = of_model(model.double(), "eager", prompt(torch.float64), routing)
    assert_matches(out, low, exact, torch.bfloat16)


def test_a_soft_prompt_refuses_token_ids() -> None:
    from moe_kernels.integrations.transformers import SoftPrompt

    model = SoftPrompt(model_of("Mixtral"))
    for x in (torch.tensor([[3, 1, 4]]), prompt()[0], prompt()[..., 1:]):
        with pytest.raises(
            ValueError, match=r"x must be embeddings \[B, P, \d+\], as model.get_input_embeddings\(\) m"
        ):
            model(x)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_an_attack_has_the_gradient_of_their_own_code_and_computes_none_of_a_weight(family: str) -> None:
    from moe_kernels.integrations.transformers import SoftPrompt

    model = SoftPrompt(model_of(family))
    grads = []

    def gradient() -> None:
        x = prompt().requires_grad_()
        with attack_mode(model):
            grads.append(torch.autograd.grad(model(x).logsumexp(1).sum(), [x])[0])

    for implementation in ("eager", "moe_kernels"):
        model.model.set_experts_implementation(implementation)
        ran = operators(gradient)
    assert "expert_linear" in ran and "expert_linear_weight_grad" not in ran
    model.double()
    model.model.set_experts_implementation("eager")
    x = prompt(torch.float64).requires_grad_()
    (exact,) = torch.autograd.grad(model(x).logsumexp(1).sum(), [x])
    assert_matches(grads[1], grads[0], exact, torch.float32)


def test_an_attack_saves_at_most_half_of_what_their_own_code_saves() -> None:
    from moe_kernels.integrations.transformers import register

    register()
    size = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = model_of("Mixtral", **size, num_local_experts=8)
    x = Source(torch.float32).randn(2, 32, 256).requires_grad_()
    kept = {}
    with attack_mode(model):
        for implementation in ("eager", "grouped_mm", "moe_kernels"):
            model.set_experts_implementation(implementation)
            kept[implementation] = saved_bytes(lambda: model(inputs_embeds=x).logits, apart_from=model)
    assert kept["moe_kernels"] <= min(kept["eager"], kept["grouped_mm"]) / 2, kept


def test_pgd_on_a_prompt_and_under_a_forced_route() -> None:
    from moe_kernels.integrations.transformers import SoftPrompt

    lm = model_of("Mixtral")
    lm.set_experts_implementation("moe_kernels")
    model, x = SoftPrompt(lm, torch.tensor([3, 1, 4])), prompt(samples=8)
    with torch.no_grad():
        y = model(x).argmax(1)
        routing = model.route(x)
        assert torch.equal(model(x, routing=routing), model(x))
    losses = {}
    for freeze in (False, True):
        attack = PGD(model, 0.5, 0.1, 10, bounds=(-math.inf, math.inf), seed=0, freeze_routing=freeze)
        x_adv = attack(x, y)
        assert (x_adv - x).abs().max() <= 0.5 + 1e-6
        with torch.no_grad():
            losses[freeze] = nn.functional.cross_entropy(model(x_adv), y)
    with torch.no_grad():
        clean = nn.functional.cross_entropy(model(x), y)
    assert min(losses.values()) > 2 * clean, (losses, clean)

    leaf = x.clone().requires_grad_()
    with attack_mode(model):
        operators_run = operators(lambda: torch.autograd.grad(model(leaf, routing=routing).sum(), [leaf]))
    assert "combine_weight_grad" not in operators_run  # a forced route has no gradient
    with pytest.raises(ValueError, match=r"routing must be for 24 rows, got 64"):
        model(x[:3], routing=routing)


def test_a_model_without_mixtures_says_so(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from moe_kernels.integrations.transformers import SoftPrompt

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=17, hidden_size=16, intermediate_size=12, **sizes))
    dense.save_pretrained(tmp_path)
    x = prompt()
    routing = {"experts": (torch.zeros(15, 2, dtype=torch.long), torch.ones(15, 2))}
    implementation = {"experts_implementation": "moe_kernels"}
    before = dense.config._experts_implementation
    for act in (
        lambda: SoftPrompt(dense).route(x),
        lambda: SoftPrompt(dense)(x, routing),
        lambda: dense.set_experts_implementation("moe_kernels"),
        lambda: LlamaForCausalLM.from_pretrained(tmp_path, **implementation),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **implementation),
    ):
        with pytest.raises(ValueError, match=r"^model must have mixtures .* for experts, got LlamaForCausalLM$"):
            act()
    assert dense.config._experts_implementation == before != "moe_kernels"
    assert SoftPrompt(LlamaForCausalLM.from_pretrained(tmp_path))(x).shape == (3, 17)  # can be attacked all the same


def test_a_mixture_is_loaded_with_the_name(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model_of("Mixtral").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moe_kernels")
    assert "expert_linear" in operators(lambda: model(inputs_embeds=prompt()))


@pytest.mark.parametrize("version", ["4.57.1", "5.23.2", "5.3.0.dev0"])
def test_old_or_missing_transformers_is_one_line(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    import transformers

    from moe_kernels.integrations.transformers import register

    with pytest.raises(ValueError, match="recompute must be one of activations, all, got 'none'"):
        register("none")
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ImportError, match=rf"^transformers must be 5\.24 or newer, got {re.escape(version)}$"):
        register()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'moe_kernels\[transformers\]'"):
        register()


def test_the_router_of_deepseek_v3_is_a_layer_here() -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    settings = TINY | MODELS["DeepseekV3"] | {"routed_scaling_factor": 2.5, "norm_topk_prob": True}
    config = DeepseekV3Config(**settings, experts_implementation="eager")
    theirs = DeepseekV3MoE(config)
    for p in (*theirs.parameters(), *theirs.buffers()):
        p.data.normal_()
    options: dict[str, Any] = {"shared_experts": 1, "balance_bias": True, "groups": (4, 2), "scale": 2.5}
    ours = RobustMoE(16, 12, 8, activation="swiglu", bias=False, gate="sigmoid", **options)
    state = theirs.state_dict()
    gate, up, down = (state[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down"))
    ours.load_state_dict(
        {
            "experts.up.weight": state["experts.gate_up_proj"],
            "experts.down.weight": state["experts.down_proj"],
            "router.weight": state["gate.weight"],
            "expert_bias": state["gate.e_score_correction_bias"],
            "shared.up.weight": torch.cat([gate, up])[None],
            "shared.down.weight": down[None],
        }
    )
    x = torch.randn(2, 40, 16)

    def run(moe: nn.Module, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        x = x.requires_grad_()
        y = moe(x)
        return y.detach(), *torch.autograd.grad(y, [x, *parameters], torch.ones_like(y).cumsum(0))

    out = run(ours, x, ours.experts.up.weight, ours.router.weight)
    with InOrder():
        low = run(theirs, x, theirs.experts.gate_up_proj, theirs.gate.weight)
    ours.double()
    exact = run(ours, x.detach().double(), ours.experts.up.weight, ours.router.weight)
    assert_matches(out, low, exact, torch.float32)


def test_the_page_does_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs/transformers.md").read_text()
    example = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[1]
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["moved"] < 0.2 and names["held"] > names["moved"] + 0.15
