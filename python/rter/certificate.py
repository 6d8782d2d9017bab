"""What can be proved: how far an image's route is from changing, and the certificate of the RT-ER paper.

For a router g(x) = W x + b the route of x stays with its expert i within

    min_j (g_i - g_j) / ||w_i - w_j||,   the norm dual to the perturbation's (L1 for Linf),

and flips just beyond that distance, unless the bounds of the pixels prevent it. W includes the normaliser: it is the
derivative of the logits with respect to x.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import ExpertConv2d, ExpertLinear
from moe_kernels.attacks import every_expert
from rter.models.classifier import RobustClassifier
from rter.models.networks import ExpertConvNet

DUAL = {"Linf": 1, "L2": 2, "L1": math.inf}


def affine_router(model: Any, x: Tensor) -> Tensor | None:
    """W [E, pixels] if the router's logits are affine in x, as tested on x and as many random images; else None."""
    start = x[:1].clone().requires_grad_()
    logits = model.route(start).logits[0]
    rows = [torch.autograd.grad(logit, [start], retain_graph=True)[0].flatten() for logit in logits]
    weight, others = torch.stack(rows), torch.cat([x, torch.rand_like(x)])
    with torch.no_grad():
        exact = model.route(others).logits
        predicted = logits + (others - x[:1]).flatten(1) @ weight.T
    return weight if torch.allclose(exact, predicted, rtol=1e-4, atol=1e-4 * exact.abs().max().item()) else None


@torch.no_grad()
def route_radius(model: Any, x: Tensor, norm: str, weight: Tensor) -> Tensor:
    """[n]: the distance within which each image provably keeps its expert."""
    logits = model.route(x).logits
    first = logits.argmax(1)
    gaps = logits.gather(1, first[:, None]) - logits  # [n, E]
    slopes = torch.linalg.vector_norm(weight[:, None] - weight, DUAL[norm], dim=-1)[first]  # [n, E]
    radius = (gaps / slopes).scatter(1, first[:, None], math.inf)  # 0 / 0 is overwritten; equal rows never flip
    return radius.nan_to_num(math.inf, math.inf).amin(1)


@torch.no_grad()
def paper_certificate(model: nn.Module, x: Tensor, y: Tensor, weight: Tensor) -> dict[str, Any] | None:
    """eps = margin / sum_i (r_i M_i + a_i(x) L_i) (Zhang et al. 2025, theorem 5.4) for sum_i a_i softmax(f_i), Linf.

    The paper leaves the constants open. Here they bound the difference of two classes' probabilities, so that the
    formula is sound: M_i = 1; r_i = max_j ||w_i - w_j||_1 / 4, since a_i (1 - a_i) <= 1/4; L_i = the product of the
    layers' operator norms from max to max norm, since that difference moves by at most the logits' largest change.
    None for a dual model, and for experts other than ExpertConvNet, whose layers are known to follow one another.
    """
    if type(model) is not RobustClassifier or not isinstance(model.moe.experts, ExpertConvNet):
        return None
    gate_lipschitz = (weight[:, None] - weight).abs().sum(-1).amax(1) / 4
    lipschitz = (1 / model.normalize.std).max() * torch.ones_like(gate_lipschitz)
    for layer in model.moe.experts.modules():
        if isinstance(layer, (ExpertConv2d, ExpertLinear)):
            lipschitz = lipschitz * layer.weight.flatten(2).abs().sum(2).amax(1)
    gates = model.route(x).logits.softmax(1)
    probabilities = (gates.T[:, :, None] * every_expert(model, x).softmax(-1)).sum(0)
    own = probabilities.gather(1, y[:, None])[:, 0]
    margin = own - probabilities.scatter(1, y[:, None], -math.inf).amax(1)
    radius = (margin / (gate_lipschitz.sum() + gates @ lipschitz)).clamp(min=0)
    return {
        "gate_lipschitz": gate_lipschitz.tolist(),
        "expert_lipschitz": lipschitz.tolist(),
        "expert_bound": 1.0,
        "median_radius": radius.median().item(),
        "greatest_radius": radius.max().item(),
    }
