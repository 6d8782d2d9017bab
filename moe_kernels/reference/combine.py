"""out[t] = sum over i of weights[t, i] * y[position[t, i]], and its two gradients; all summed in fp32 or wider."""

import torch
from torch import Tensor


def _wide(x: Tensor, like: Tensor) -> Tensor:
    return x.to(torch.promote_types(like.dtype, torch.float32))


def combine(y: Tensor, weights: Tensor, position: Tensor) -> Tensor:
    return torch.einsum("ti,ti...->t...", _wide(weights, y), _wide(y, y)[position]).to(y.dtype)


def combine_input_grad(grad: Tensor, weights: Tensor, position: Tensor) -> Tensor:
    slots = torch.einsum("ti,t...->ti...", _wide(weights, grad), _wide(grad, grad)).flatten(0, 1)
    return slots[position.flatten().argsort()].to(grad.dtype)


def combine_weight_grad(grad: Tensor, y: Tensor, position: Tensor) -> Tensor:
    products = _wide(grad, y).unsqueeze(1) * _wide(y, y)[position]  # [T, k, ...]
    return products.unsqueeze(-1).flatten(2).sum(-1)
