"""Adversarial weight perturbation: the gradient of L is taken at w + v, with v = gamma |w| dL/dw / |dL/dw|.

The norms are over one weight matrix or convolution kernel, in grouped layers that of one expert; biases and the scales
of batch norm are not perturbed. The adversarial images are those found at w.

Source: Wu, Xia and Wang, Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def perturbed_weights(part: nn.Module, gamma: float) -> Iterator[None]:
    """Inside, the weights of `part` are w + v, with v from their .grad; on exit they are w again, bit for bit."""
    kept = []
    with torch.no_grad():
        for weight, dims in _weights(part):
            if weight.grad is not None:
                kept.append((weight, weight.clone()))
                norm, slope = (torch.linalg.vector_norm(t, dim=dims, keepdim=True) for t in (weight, weight.grad))
                weight.add_(gamma * norm / slope.clamp_min(torch.finfo(slope.dtype).tiny) * weight.grad)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in kept:
                weight.copy_(value)


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Restores the values of buffers, such as the statistics of batch norm, on exit."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


def _weights(part: nn.Module) -> Iterator[tuple[nn.Parameter, tuple[int, ...]]]:
    """Every weight, with the dimensions that one matrix or kernel spans: all except that of the experts, if any."""
    for module in part.modules():
        lead = 1 if hasattr(module, "num_experts") else 0
        for parameter in module.parameters(recurse=False):
            if parameter.ndim - lead > 1:
                yield parameter, tuple(range(lead, parameter.ndim))
