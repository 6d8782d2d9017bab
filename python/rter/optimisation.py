"""The optimiser, the gradients it is given, and the running mean of the weights."""

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_kernels.nn import GroupedNetwork
from rter.config import Config
from rter.distributed import Share, whole
from rter.errors import NonFiniteError
from rter.models.classifier import RobustClassifier
from rter.schedules import OPTIMIZERS, SCHEDULES, one_cycle_between


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    kind, own = OPTIMIZERS[config.optimizer]
    options = {name: getattr(config, name) for name in ("lr", "weight_decay", *own)}
    optimizer: torch.optim.Optimizer = getattr(torch.optim, kind)(list(model.parameters()), **options)
    return optimizer


def finish_gradients(weights: list[nn.Parameter], share: Share | None, clip_norm: float) -> None:
    """Turns the gradients into those of the joint batch, checks them and, with a `clip_norm` above 0, clips them.

    Raises:
        NonFiniteError: if their norm is not finite.
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
    """Sets the learning rate of step `index` of `total`; one-cycle also moves the momentum, in the opposite sense."""
    for group in optimizer.param_groups:
        group["lr"] = SCHEDULES[config.schedule](config, index, total)
        if config.schedule == "one-cycle":
            momentum = one_cycle_between(index, total, 0.95, 0.85, 0.95)
            group |= {"betas": (momentum, group["betas"][1])} if "betas" in group else {"momentum": momentum}


class RunningMean:
    """The exponential moving average of a model's weights, with a smaller decay in the first steps.

    The statistics of batch norm are copied from the model, since they are running means already, as in Gowal et al.
    (Uncovering the Limits of Adversarial Training, 2020) and in PyTorch's AveragedModel.
    """

    def __init__(self, model: RobustClassifier, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model), decay

    @torch.no_grad()
    def update(self, model: nn.Module, index: int) -> None:
        decay = min(self.decay, (1 + index) / (10 + index))
        for mean, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.lerp_(weight, 1 - decay)
        for copied, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            copied.copy_(buffer)


@torch.no_grad()
def upcycle(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Gives all experts the weights, the statistics and, with an optimiser, the moments of the first one.

    Source: Komatsuzaki et al., Sparse Upcycling, ICLR 2023.
    """
    for experts in (module for module in model.modules() if isinstance(module, GroupedNetwork)):
        weights = list(experts.parameters())
        states = [optimizer.state.get(w, {}) for w in weights] if optimizer else []
        moments = [m for state in states for m in state.values() if isinstance(m, Tensor) and m.dim() > 0]
        for tensor in (*weights, *experts.buffers(), *moments):
            tensor[1:] = tensor[:1]


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The running statistics of batch norm, which come from the batches of this process alone."""
    names = ("running_mean", "running_var")
    named = [(name.rpartition(".")[2], buffer) for name, buffer in model.named_buffers()]
    return [buffer for name, buffer in named if name in names and not isinstance(buffer, DTensor)]
