"""The optimisers by name, and the learning rate as a function of the step alone. Imports no torch."""

import math

from rter.config import Config

# the class in torch.optim, and the settings that it takes besides lr and weight_decay
OPTIMIZERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "adamw": ("AdamW", ()),
    "adam": ("Adam", ()),
    "sgd": ("SGD", ("momentum",)),
}


def one_cycle(config: Config, index: int, total: int) -> float:
    """From lr / 25 to lr in 30 % of the steps, then down to lr / 250,000 (Smith and Topin 2018, PyTorch's defaults)."""
    first = config.lr / 25
    return one_cycle_between(index, total, first, config.lr, first / 1e4)


def cyclic(config: Config, index: int, total: int) -> float:
    """Rises linearly from lr_low * lr to lr in cycle_steps, falls in as many, and repeats (Smith 2017)."""
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


def one_cycle_between(index: int, total: int, first: float, middle: float, last: float) -> float:
    turn = 0.3 * total - 1
    if index <= turn:
        return _half_cosine(first, middle, index / turn)
    return _half_cosine(middle, last, (index - turn) / (total - 1 - turn))


def _half_cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) / 2 * (math.cos(math.pi * part) + 1)
