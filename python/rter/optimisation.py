"""The optimiser, its learning rate as a function of the step alone, and the running mean of the weights."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rter.config import Config
from rter.distributed import Share, whole
from rter.errors import NonFiniteError
from rter.models import RobustClassifier

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], Config], torch.optim.Optimizer]] = {
    "adamw": lambda weights, config: torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay),
    "adam": lambda weights, config: torch.optim.Adam(weights, lr=config.lr, weight_decay=config.weight_decay),
    "sgd": lambda weights, config: torch.optim.SGD(
        weights, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    ),
}


def one_cycle(config: Config, index: int, total: int) -> float:
    """From lr / 25 to lr in 30 % of the steps, then to lr / 250,000 (Smith and Topin 2018, PyTorch's defaults)."""
    first = config.lr / 25
    return _one_cycle(index, total, first, config.lr, first / 1e4)


def cyclic(config: Config, index: int, total: int) -> float:
    """Straight up from lr_low * lr to lr in cycle_steps, down in as many, and so on (Smith 2017)."""
    part = abs(index % (2 * config.cycle_steps) / config.cycle_steps - 1)
    return config.lr * (1 - part * (1 - config.lr_low))


def multi_step(config: Config, index: int, total: int) -> float:
    epoch = index * config.epochs // total
    return config.lr * 0.1 ** sum(int(drop) <= epoch for drop in config.drops.split(","))


def cosine(config: Config, index: int, total: int) -> float:
    return _half_cosine(config.lr, 0.0, index / total)


def constant(config: Config, index: int, total: int) -> float:
    return config.lr


SCHEDULES = {
    "one-cycle": one_cycle,
    "cyclic": cyclic,
    "multi-step": multi_step,
    "cosine": cosine,
    "constant": constant,
}


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    return OPTIMIZERS[config.optimizer](list(model.parameters()), config)


def finish_gradients(weights: list[nn.Parameter], share: Share | None, clip_norm: float) -> None:
    """Makes the gradients those of the joint batch, checks them and, with a `clip_norm` above 0, clips them.

    Raises:
        NonFiniteError: if their norm is no finite number.
    """
    if share:
        share.sum_gradients_(weights)
    used = [weight for weight in weights if weight.grad is not None]
    kinds = [[weight for weight in used if isinstance(weight, DTensor) is spread] for spread in (False, True)]
    norms = [whole(nn.utils.get_total_norm([w.grad for w in kind if w.grad is not None])) for kind in kinds if kind]
    norm = norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms)
    if not norm.isfinite():
        raise NonFiniteError("the gradient", norm.item())
    if clip_norm > 0:
        for kind in kinds:
            nn.utils.clip_grads_with_norm_(kind, clip_norm, norm)


def set_rate(optimizer: torch.optim.Optimizer, config: Config, index: int, total: int) -> None:
    """Sets the learning rate of step `index` of `total`; the one-cycle schedule moves the momentum against it."""
    for group in optimizer.param_groups:
        group["lr"] = SCHEDULES[config.schedule](config, index, total)
        if config.schedule == "one-cycle":
            momentum = _one_cycle(index, total, 0.95, 0.85, 0.95)
            group |= {"betas": (momentum, group["betas"][1])} if "betas" in group else {"momentum": momentum}


def _one_cycle(index: int, total: int, first: float, middle: float, last: float) -> float:
    turn = 0.3 * total - 1
    if index <= turn:
        return _half_cosine(first, middle, index / turn)
    return _half_cosine(middle, last, (index - turn) / (total - 1 - turn))


def _half_cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) / 2 * (math.cos(math.pi * part) + 1)


class RunningMean:
    """The exponential moving average of a model's weights; its first steps average over as many as there were."""

    def __init__(self, model: RobustClassifier, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model), decay

    @torch.no_grad()
    def update(self, model: nn.Module, index: int) -> None:
        decay = min(self.decay, (1 + index) / (10 + index))
        for mean, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.lerp_(weight, 1 - decay)
        for copied, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            copied.copy_(buffer)


def running_statistics(model: nn.Module) -> list[Tensor]:
    """What batch norm remembers of the batches that this process has seen."""
    names = ("running_mean", "running_var")
    named = [(name.rpartition(".")[2], buffer) for name, buffer in model.named_buffers()]
    return [buffer for name, buffer in named if name in names and not isinstance(buffer, DTensor)]
