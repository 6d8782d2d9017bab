"""Standard training: L = CE(F(x), y) + lambda balance(x)."""

from torch import Tensor
from torch.nn import functional as F

from rter.methods.step import Step


def terms(step: Step, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"clean": F.cross_entropy(step.model(x, routing=step.own_route(x)), y), "balance": step.balance(x)}
