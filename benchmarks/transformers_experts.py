"""Implementations of the experts of a transformers mixture: bytes that a forward keeps, and the time of a step.

A Mixtral with two layers of width 256 and 8 experts, 2 for each of 512 tokens. Attack: everything is frozen, and only
the embeddings get a gradient. LoRA: the experts are frozen, the attention is trained. Training: everything is trained.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from moe_kernels.integrations.transformers import register
from moe_kernels.testing.saved import saved_bytes

TOKENS, WIDTH, REPEATS = (4, 128), 256, 9
IMPLEMENTATIONS = {"eager": None, "grouped_mm": None, "ours": "all", 'ours, recompute="activations"': "activations"}
TRAINED = {"attack": (), "LoRA": ("self_attn",), "training": ("",)}


def mixture() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    return MixtralForCausalLM(MixtralConfig(vocab_size=128, num_hidden_layers=2, num_local_experts=8, **sizes)).eval()


def choose(model: nn.Module, name: str) -> None:
    recompute = IMPLEMENTATIONS[name]
    if recompute:
        register(recompute)
    model.set_experts_implementation("moe_kernels" if recompute else name)  # type: ignore[operator]


def main() -> None:
    model, x = mixture(), torch.randn(*TOKENS, WIDTH, requires_grad=True)
    print("| what learns | experts | kept per token, KB | ms per step | of grouped_mm |")
    print("| :-- | :-- | --: | --: | --: |")
    for case, trained in TRAINED.items():
        for name, p in model.named_parameters():
            p.requires_grad_(any(part in name for part in trained))
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

        def forward() -> Tensor:
            return model(inputs_embeds=x).logits

        def step(leaves: list[Tensor] = leaves, forward: Callable[[], Tensor] = forward) -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward().logsumexp(-1).mean(), leaves, allow_unused=True)

        kept, expected, times = {}, None, {name: [] for name in IMPLEMENTATIONS}
        for name in IMPLEMENTATIONS:
            choose(model, name)
            grad = step()[0]
            expected = grad if expected is None else expected
            assert (grad - expected).abs().max() <= 1e-4 * expected.abs().max(), name
            kept[name] = saved_bytes(forward, apart_from=model) / (TOKENS[0] * TOKENS[1]) / 1000
        for _ in range(REPEATS):  # in turns, since the speed of a machine varies
            for name, seen in times.items():
                choose(model, name)
                begin = time.perf_counter()
                step()
                seen.append(time.perf_counter() - begin)
        median = {name: statistics.median(seen) * 1000 for name, seen in times.items()}
        for name in IMPLEMENTATIONS:
            ratio = median[name] / median["grouped_mm"]
            print(f"| {case} | {name} | {kept[name]:.1f} | {median[name]:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
