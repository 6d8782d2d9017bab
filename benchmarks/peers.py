"""The strongest plain-PyTorch ways to do what the kernels do."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_kernels import ExpertMLP, ExpertResNet18, RobustMoE
from moe_kernels.testing.networks import ResNet18


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


def pgd(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, eps: float, alpha: float, steps: int) -> Tensor:
    """PGD from x as it is usually written: mean cross-entropy, parameters left trainable."""
    x_adv = x.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        loss = F.cross_entropy(model(x_adv), y)
        (grad,) = torch.autograd.grad(loss, [x_adv])
        x_adv = pgd_step(x_adv.detach(), grad, x, eps, alpha).detach()
    return x_adv


class OneImageAtATime(nn.Module):
    """A MoE that sends every image separately through the expert its router picks: one forward per image."""

    def __init__(self, experts: list[nn.Module], router: nn.Module) -> None:
        super().__init__()
        self.experts, self.router = nn.ModuleList(experts), router

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        return torch.cat([self.experts[int(e)](image[None]) for e, image in zip(chosen, x, strict=True)])

    @classmethod
    def of(cls, experts: ExpertResNet18, router: nn.Module) -> "OneImageAtATime":
        """The same experts as networks of plain torch."""
        alone = []
        for e in range(experts.num_experts):
            single = ResNet18(width=experts.conv1.weight.shape[1])
            single.load_state_dict({name: t[e] for name, t in experts.state_dict().items()})
            alone.append(single.train(experts.training))
        return cls(alone, router)


def rt_er_step(moe: OneImageAtATime, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int) -> Tensor:
    """RT-ER's two attacks and three forwards, image by image."""
    second = moe.router(x).topk(2).indices[:, 1]

    def second_expert(x: Tensor) -> Tensor:
        return torch.cat([moe.experts[int(e)](image[None]) for e, image in zip(second, x, strict=True)])

    x1 = pgd(moe, x, y, eps, alpha, steps)
    x2 = pgd(second_expert, x, y, eps, alpha, steps)
    log_p, log_q = second_expert(x).log_softmax(-1), second_expert(x2).log_softmax(-1)
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    loss = F.cross_entropy(moe(x1), y) + 6 * kl
    loss.backward()
    return loss.detach()
