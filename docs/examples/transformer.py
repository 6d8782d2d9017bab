"""A small language model whose feed-forward blocks are mixtures of experts: `python docs/examples/transformer.py`.

It reads a text character by character and learns to predict the next one. The balance loss keeps all experts in use.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels import RobustMoE


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, num_experts: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.moe = RobustMoE(dim, 2 * dim, num_experts, top_k=2, activation="swiglu")
        self.moe.keep_routing = True  # so that the loss finds the routing of the last forward

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # [B, T, dim]
        h = self.norm1(x)
        x = x + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.moe(self.norm2(x))


class LanguageModel(nn.Module):
    def __init__(self, characters: int, length: int, dim: int = 64, depth: int = 2, num_experts: int = 8) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(characters, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(Block(dim, 4, num_experts) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, characters))

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] to logits [B, T, characters]
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        x = self.embedding(tokens) + self.place.weight[:length]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def main(text: str, steps: int = 300, length: int = 64, batch: int = 16) -> tuple[list[float], Tensor]:
    """Returns the loss of each step, and the part of the tokens that each expert of the last block received."""
    torch.manual_seed(0)
    alphabet = sorted(set(text))
    tokens = torch.tensor([alphabet.index(c) for c in text])
    model = LanguageModel(len(alphabet), length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        starts = torch.randint(len(tokens) - length, (batch, 1))
        window = tokens[starts + torch.arange(length + 1)]  # [B, T + 1]
        logits = model(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        routings = [block.moe.last_routing for block in model.blocks]
        balance = sum(routing.balance_loss() for routing in routings)
        optimizer.zero_grad()
        (loss + 0.01 * balance).backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            load = " ".join(f"{part:.2f}" for part in routings[-1].load.tolist())
            print(f"step {step:3}   loss {loss.item():.3f}   load of the experts {load}")
    return losses, routings[-1].load


if __name__ == "__main__":
    main(Path(__file__).read_text())
