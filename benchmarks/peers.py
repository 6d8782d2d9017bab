"""The strongest plain-PyTorch ways to do what the kernels do."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import ExpertMLP, RobustMoE


def route_and_sort(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """softmax, topk, stable argsort, bincount: weights, order, offsets."""
    weights, experts = logits.softmax(-1).topk(k)
    weights = weights / weights.sum(-1, keepdim=True)
    order = experts.flatten().argsort(stable=True)
    return weights, order, experts.flatten().bincount(minlength=logits.shape[1]).cumsum(0).int()


def combine(y: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """index_add of the weighted expert outputs."""
    k = weights.shape[1]
    out = y.new_zeros(weights.shape[0], y.shape[1])
    return out.index_add(0, order // k, y * weights.flatten()[order, None].to(y.dtype))


def grouped_mm_layer(moe: RobustMoE, x: Tensor) -> Tensor:
    """The layer as F.grouped_mm, argsort and index_add."""
    experts = moe.experts
    assert isinstance(experts, ExpertMLP)
    weights, order, ends = route_and_sort(moe.router(x), moe.top_k)
    row_expert = torch.searchsorted(ends, torch.arange(order.numel(), dtype=torch.int32), right=True)
    h = F.grouped_mm(x[order // moe.top_k], experts.up.weight.transpose(1, 2), offs=ends)
    h = F.gelu(h + experts.up.bias[row_expert])
    y = F.grouped_mm(h, experts.down.weight.transpose(1, 2), offs=ends) + experts.down.bias[row_expert]
    return combine(y, weights, order)


def masked_loop_layer(moe: RobustMoE, x: Tensor) -> Tensor:
    """The layer as a loop over experts, each on the rows that chose it."""
    experts = moe.experts
    assert isinstance(experts, ExpertMLP)
    weights, chosen = moe.router(x).softmax(-1).topk(moe.top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for e in range(moe.num_experts):
        rows, slot = (chosen == e).nonzero(as_tuple=True)
        h = F.gelu(F.linear(x[rows], experts.up.weight[e], experts.up.bias[e]))
        y = F.linear(h, experts.down.weight[e], experts.down.bias[e])
        out.index_add_(0, rows, y * weights[rows, slot, None])
    return out


def pgd_step(x_adv: Tensor, grad: Tensor, x: Tensor, eps: float, alpha: float) -> Tensor:
    """The usual update of seven elementwise kernels."""
    x_adv = x_adv + alpha * grad.sign()
    delta = torch.clamp(x_adv - x, min=-eps, max=eps)
    return torch.clamp(x + delta, min=0, max=1)


def pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int) -> Tensor:
    """PGD from x as it is usually written: mean cross-entropy, parameters left trainable."""
    x_adv = x.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        loss = F.cross_entropy(model(x_adv), y)
        (grad,) = torch.autograd.grad(loss, [x_adv])
        x_adv = pgd_step(x_adv.detach(), grad, x, eps, alpha).detach()
    return x_adv


class OneImageAtATime(nn.Module):
    """A MoE that sends every image alone through the expert its router picks: a forward for each image."""

    def __init__(self, experts: list[nn.Module], router: nn.Module) -> None:
        super().__init__()
        self.experts, self.router = nn.ModuleList(experts), router

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        return torch.cat([self.experts[int(e)](image[None]) for e, image in zip(chosen, x, strict=True)])
