"""Vision transformers, one per expert. With the images their tokens are sorted by expert, at offsets times tokens."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe_kernels import _checks as check
from moe_kernels._torch import inside_transform
from moe_kernels.nn.grouped import GroupedNetwork
from moe_kernels.nn.layers import ExpertConv2d, ExpertLayerNorm, ExpertLinear, parameter_of_each_row
from moe_kernels.nn.recompute import RECOMPUTE, recomputed


def over_tokens(layer: ExpertLinear, x: Tensor, offsets: Tensor) -> Tensor:
    """A linear layer on every token of x [N, T, in] -> [N, T, out]."""
    return layer(x.flatten(0, 1), offsets * x.shape[1]).unflatten(0, x.shape[:2])


class ExpertAttention(nn.Module):
    """Self-attention among the tokens of each image: proj(softmax(q k^T / sqrt(d)) v), with q, k, v = qkv(x)."""

    def __init__(self, num_experts: int, width: int, heads: int, **to: Any) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = ExpertLinear(num_experts, width, 3 * width, **to)
        self.proj = ExpertLinear(num_experts, width, width, **to)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, T, width] sorted by expert -> the same shape."""
        qkv = over_tokens(self.qkv, x, offsets).unflatten(2, (3, self.heads, -1))  # [N, T, 3, heads, d]
        with sdpa_kernel(SDPBackend.MATH) if inside_transform() else nullcontext():  # only this has a forward mode
            h = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))  # [N, heads, T, d]
        return over_tokens(self.proj, recomputed(_merge_heads, h), offsets)


def _merge_heads(h: Tensor) -> Tensor:
    """[N, heads, T, d] -> [N, T, heads d]"""
    return h.transpose(1, 2).flatten(2)


class ExpertTransformerBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)) with a GELU."""

    def __init__(self, num_experts: int, width: int, heads: int, **to: Any) -> None:
        super().__init__()
        self.norm1 = ExpertLayerNorm(num_experts, width, 1e-6, **to)
        self.attn = ExpertAttention(num_experts, width, heads, **to)
        self.norm2 = ExpertLayerNorm(num_experts, width, 1e-6, **to)
        self.mlp = nn.ModuleDict(
            {
                "fc1": ExpertLinear(num_experts, width, 4 * width, **to),
                "fc2": ExpertLinear(num_experts, 4 * width, width, **to),
            }
        )

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x, offsets), offsets)
        h = recomputed(F.gelu, over_tokens(self.mlp["fc1"], self.norm2(x, offsets), offsets))  # type: ignore[arg-type]
        return x + over_tokens(self.mlp["fc2"], h, offsets)  # type: ignore[arg-type]


class ExpertViT(GroupedNetwork):
    """A vision transformer per expert, its tensors named as in timm; ViT-S/16 at 224 pixels unless told otherwise.

    Args:
        num_experts: number of experts E.
        num_classes: number of logits.
        in_channels: channels of the images.
        image_size: height and width of the images.
        patch: height and width of a patch.
        width: size of a token, a multiple of heads.
        depth: number of blocks.
        heads: attention heads.
        device, dtype: those of the parameters.
        recompute: what the backward recomputes instead of saving it: "none"; "activations", which saves the results of
            linear maps and of attention, and the sums of blocks; "all", which saves only the images and recomputes one
            expert after the other (`GroupedNetwork`).

    Raises:
        ValueError: if a size is less than 1, image_size is not a multiple of patch, width is not one of heads, or
            recompute is unknown.
    """

    def __init__(
        self,
        num_experts: int,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 224,
        patch: int = 16,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        check.one_of("recompute", recompute, RECOMPUTE)
        sizes = {"num_classes": num_classes, "image_size": image_size, "patch": patch, "width": width, "heads": heads}
        for name, size in sizes.items():
            check.count(name, size, 1)
        check.count("depth", depth, 0)
        if image_size % patch or width % heads:
            raise ValueError(
                "image_size must be a multiple of patch, and width of heads, "
                f"got {image_size} by {patch} and {width} by {heads}"
            )
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_experts, self.recompute, self.image_size = num_experts, recompute, image_size
        tokens = (image_size // patch) ** 2 + 1
        self.patch_embed = nn.ModuleDict({"proj": ExpertConv2d(num_experts, in_channels, width, patch, patch, **to)})
        self.cls_token = nn.Parameter(torch.zeros(num_experts, 1, 1, width, **to))
        self.pos_embed = nn.Parameter(torch.empty(num_experts, 1, tokens, width, **to))
        self.blocks = nn.ModuleList(ExpertTransformerBlock(num_experts, width, heads, **to) for _ in range(depth))
        self.norm = ExpertLayerNorm(num_experts, width, 1e-6, **to)
        self.head = ExpertLinear(num_experts, width, num_classes, **to)
        for module in self.modules():
            if isinstance(module, ExpertLinear):
                module.init_std = 0.02
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws positions and linear weights from a truncated normal distribution of deviation 0.02; linear biases and
        class tokens become zero."""
        nn.init.zeros_(self.cls_token)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, ExpertLinear):
                module.reset_parameters()

    def logits(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [N, C, image_size, image_size] sorted by expert -> logits [N, num_classes].

        Raises:
            ValueError: for images of another size.
        """
        if x.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(f"x must be [N, C, {self.image_size}, {self.image_size}], got {list(x.shape)}")
        h = self.patch_embed["proj"](x, offsets).flatten(2).transpose(1, 2)
        first = parameter_of_each_row(self.cls_token, offsets, len(x)).squeeze(1)  # [N, 1, width]
        h = torch.cat([first, h], 1) + parameter_of_each_row(self.pos_embed, offsets, len(x)).squeeze(1)
        for block in self.blocks:
            h = block(h, offsets)
        return self.head(self.norm(h[:, :1], offsets)[:, 0], offsets)
