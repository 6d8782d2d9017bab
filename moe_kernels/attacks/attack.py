"""What gradient attacks share: their checks, the start in the ball, the gradient, and the best candidate so far."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from moe_kernels import _checks as check
from moe_kernels import _fsdp as fsdp
from moe_kernels._torch import autocast_dtype, compiled
from moe_kernels.attacks.attack_mode import MODES, frozen, mode_of
from moe_kernels.attacks.losses import Loss
from moe_kernels.ops.pgd_step_ import norm_name, step_unchecked_

# model -> dtype of the computation -> elements of an input for which no rule of the lean mode was worth its time
_IDLE = WeakIdKeyDictionary()


class Attack(ABC):
    """Base class of `PGD` and `APGD`, which define how the iterates move (`_attack`).

    Attributes:
        nan_gradients, zero_gradients: how many per-sample gradients of the last call held a NaN, and how many were
            zero everywhere.
    """

    targeted = False
    draws = 1
    _in_model: Any = nullcontext()
    _needs_view = False
    loss: Any = None

    def __init__(
        self,
        model: Callable[..., Tensor],
        eps: float | str | Tensor,
        steps: int,
        norm: str,
        random_start: bool,
        restarts: int,
        bounds: tuple[float, float],
        seed: int | None,
        recompute: str = "none",
        compile: bool = False,
    ) -> None:
        check.one_of("recompute", recompute, MODES)
        if compile and recompute != "none":
            raise ValueError(f'recompute must be "none" with compile=True, since torch chooses then, got {recompute!r}')
        self.steps, self.restarts = check.count("steps", steps, 0), check.count("restarts", restarts, 1)
        if restarts > 1 and not random_start:
            raise ValueError(f"restarts must be 1 without random_start, since all would be equal, got {restarts}")
        if seed is not None and not isinstance(seed, Integral):
            raise ValueError(f"seed must be an integer or None, got {seed!r}")
        check.bounds(bounds)
        check.model(model)
        self.model = model
        self.eps = magnitude("eps", eps)
        self.norm = norm_name(norm)
        self.random_start = random_start
        self.attack_misclassified = True
        self.recompute = recompute
        self.compile = compile
        self._compiled: tuple[Any, Callable[..., Any]] | None = None  # the model and its compiled form
        low, high = (b.item() if isinstance(b, Tensor) else b for b in bounds)
        self.bounds = low, high
        self.seed = None if seed is None else int(seed)
        self._counts = torch.zeros(3, dtype=torch.int64)
        self._probabilities: Tensor | None = None  # whether the first logits of a call look like probabilities
        if self.norm == "Linf" and not isinstance(self.eps, Tensor):
            if self.eps > bounds[1] - bounds[0]:
                warnings.warn(f"eps={self.eps} is wider than bounds {bounds}; write 8/255, not 8", stacklevel=3)
            if self.eps == 0.031:
                warnings.warn("eps=0.031 is not 8/255 = 0.03137..., which published results use", stacklevel=3)

    @property
    def nan_gradients(self) -> int:
        return int(self._counts[0])

    @property
    def zero_gradients(self) -> int:
        return int(self._counts[1])

    def __call__(self, x: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
        """Attacks a batch.

        Args:
            x: float32 or float64 [B, ...] within bounds. 16-bit images are refused, since they are too coarse for an
                eps ball; to run the model in 16 bits, call the attack under autocast.
            y: integer [B], true classes, or target classes if targeted.
            kwargs: passed on to the model, e.g. routing=... to attack under a forced route.

        Returns:
            x_adv, detached, with the dtype, shape and memory format of x; x itself if the batch is empty.

        Raises:
            ValueError: if x, y, eps, alpha, the logits or the losses have a wrong shape, dtype or value, or if the
                logits do not depend on x through differentiable operations.
        """
        _check_shapes(x, y, **self._magnitudes())
        with torch.inference_mode(False):
            self._counts = torch.zeros(3, dtype=torch.int64, device=x.device)  # NaN, zero, all
        if x.numel() == 0:
            return x.detach()
        labels = y.to(torch.int64)
        _check_values(x, labels, self.bounds)
        self._probabilities = None
        self._least_classes = int(labels.max()) + 1
        small = isinstance(self.model, nn.Module) and x.numel() <= _IDLE.get(self.model, {}).get(autocast_dtype(x), 0)
        idle = self.compile or (self.recompute == "none" and small)
        self._in_model = nullcontext() if idle else mode_of(self.model, self.recompute)
        self._needs_view = fsdp.needs_view(self.model)
        with torch.inference_mode(False), torch.enable_grad(), frozen(self.model):
            x_adv = self._attack(x.detach(), y.to(torch.int64, copy=True), kwargs)
        if self._probabilities is not None and self._probabilities:
            warnings.warn("model returned probabilities where logits are expected; leave out its softmax", stacklevel=2)
        if self.nan_gradients:
            message = f"{self.nan_gradients} of {int(self._counts[2])} gradients held a NaN"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return x_adv

    def _magnitudes(self) -> dict[str, float | Tensor]:
        return {"eps": self.eps}

    @abstractmethod
    def _attack(self, x: Tensor, y: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """x_adv for x and y that have been checked, with the model frozen."""

    def _best_of(self, runs: Iterable[Callable[[Any], "Best"]], x: Tensor, y: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Each sample's best result of several runs. A run gets only the rows of x that have not been fooled before.

        Keywords and a callable loss may refer to the whole batch, so with them every run gets all rows.
        """
        whole = bool(kwargs) or callable(self.loss)
        best = Best(x)
        if not self.attack_misclassified and not whole:
            best.success = self._succeeds(x, y)
        for i, run in enumerate(runs):
            rows: Any = slice(None)
            if not whole and (i or not self.attack_misclassified):
                rows = (~best.success).nonzero().squeeze(1)
                if len(rows) == 0:
                    break
            best.offer_rows(rows, run(rows))
        return best.x

    def _succeeds(self, x: Tensor, y: Tensor) -> Tensor:
        """[B]: whether the attack has succeeded at x, in most draws of a random model."""
        with torch.no_grad():
            each = [(self._logits(x, {}).argmax(1) == y) == self.targeted for _ in range(self.draws)]
        return 2 * torch.stack(each).sum(0) > self.draws

    def _generator(self, x: Tensor) -> torch.Generator:
        generator = torch.Generator(x.device)
        generator.seed() if self.seed is None else generator.manual_seed(self.seed)
        return generator

    def _forward(self) -> Callable[..., Any]:
        """The model; with `compile` and in grad mode, the model compiled by torch, which is made once."""
        if not self.compile or not torch.is_grad_enabled():
            return self.model
        if self._compiled is None or self._compiled[0] is not self.model:
            self._compiled = self.model, compiled(self.model)
        return self._compiled[1]

    def _logits(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        with self._in_model as mode:
            logits = self._forward()(x.view_as(x) if self._needs_view else x, **kwargs)
        if x.requires_grad and mode is not None and not mode.applied:
            self._in_model = nullcontext()
            if isinstance(self.model, nn.Module):
                _IDLE.setdefault(self.model, {})[autocast_dtype(x)] = x.numel()
        _check_logits(logits, len(x), self._least_classes)
        if self._probabilities is None and isinstance(self.loss, str):
            self._probabilities = _are_probabilities(logits.detach())
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _evaluate(self, x: Tensor, y: Tensor, loss: Loss, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The objective to ascend and whether the attack has succeeded, both [B]."""
        logits = self._logits(x, kwargs)
        with self._in_model, torch.autocast(x.device.type, enabled=False):
            losses = loss(logits, y)
        if losses.shape != y.shape:
            raise ValueError(f"loss must return one value per sample, [{len(y)}], got {list(losses.shape)}")
        return (-losses if self.targeted else losses), (logits.argmax(1) == y) == self.targeted

    def _gradient(self, objective: Tensor, leaf: Tensor) -> Tensor:
        grad = torch.autograd.grad(objective.sum(), [leaf], allow_unused=True)[0] if objective.requires_grad else None
        if grad is None:
            raise ValueError("model must return logits that depend on x through differentiable operations, got none")
        largest = grad.reshape(len(grad), -1).abs().amax(1)  # keeps NaN; takes a fifteenth of vector_norm's time
        self._counts += torch.stack([largest.isnan(), largest == 0, torch.ones_like(largest, dtype=torch.bool)]).sum(1)
        return grad

    def _uniform_start(self, x: Tensor, eps: Tensor, generator: torch.Generator) -> Tensor:
        return self._projected(x + per_sample(eps, x) * _uniform_in_unit_ball(x, self.norm, generator), x, eps)

    def _step(self, x_adv: Tensor, grad: Tensor, x: Tensor, eps: Tensor, alpha: Tensor) -> Tensor:
        """`pgd_step_` without its checks, which were made once for all steps; eps [B], alpha [B] or [1]."""
        return step_unchecked_(x_adv, grad, x, eps, alpha, self.norm, (float(self.bounds[0]), float(self.bounds[1])))

    def _projected(self, candidate: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        """Projects the candidate onto the ball and the bounds, in place."""
        return self._step(candidate, torch.zeros_like(x), x, eps, eps.new_zeros(1))


class Best:
    """Each sample's strongest candidate so far: a success beats a failure; among equals the greater objective wins."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.clone()
        self.objective = x.new_full((len(x),), -math.inf)
        self.success = torch.zeros_like(self.objective, dtype=torch.bool)

    def offer(self, x: Tensor, objective: Tensor, success: Tensor) -> None:
        greater = (success == self.success) & (objective > self.objective)  # False for NaN
        better = greater | (success & ~self.success)
        torch.where(per_sample(better, x), x, self.x, out=self.x)
        number = objective.nan_to_num(-math.inf, math.inf, -math.inf).to(self.objective.dtype)
        torch.where(better, number, self.objective, out=self.objective)
        self.success |= success

    def offer_rows(self, rows: Any, found: "Best") -> None:
        """Offers what a run found for some rows, an index tensor or a slice."""
        x, objective, success = self.x.clone(), self.objective.clone(), self.success.clone()
        x[rows], objective[rows], success[rows] = found.x, found.objective, found.success
        self.offer(x, objective, success)


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """[B] shaped to broadcast against x [B, ...]."""
    return value.view(-1, *[1] * (x.ndim - 1))


def _uniform_in_unit_ball(x: Tensor, norm: str, generator: torch.Generator) -> Tensor:
    """One point per sample, uniformly distributed, in the shape of x [B, ...].

    For p = 1, 2: g / (sum |g|^p + z)^(1/p), where g has a density proportional to exp(-|g|^p) and z ~ Exp(1) (Barthe,
    Guedon, Mendelson and Naor, "A probabilistic approach to the geometry of the l_p^n-ball", 2005, theorem 1).
    """
    if norm == "Linf":
        return torch.empty_like(x).uniform_(-1, 1, generator=generator)
    z = x.new_empty(len(x)).exponential_(generator=generator)
    if norm == "L2":
        g = torch.empty_like(x).normal_(0, math.sqrt(0.5), generator=generator)
        return g / per_sample((g.square().reshape(len(x), -1).sum(1) + z).sqrt(), x)
    g = torch.empty_like(x).exponential_(generator=generator) - torch.empty_like(x).exponential_(generator=generator)
    return g / per_sample(g.abs().reshape(len(x), -1).sum(1) + z, x)


def magnitude(name: str, value: float | str | Tensor) -> float | Tensor:
    try:
        number = float(Fraction(value)) if isinstance(value, str) else value
        number = number.detach() if isinstance(number, Tensor) else number
        valid = isinstance(number, Real | Tensor) and _is_magnitude(number)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError):
        valid = False
    if not valid:
        raise ValueError(f"{name} must be finite and >= 0: a number, a fraction '8/255' or a tensor [B], got {value!r}")
    return number


def _is_magnitude(number: float | Tensor) -> bool:
    wide = torch.as_tensor(number, dtype=torch.float64)
    return bool((wide.isfinite() & (wide >= 0)).all())


def _are_probabilities(logits: Tensor) -> Tensor:
    """Whether every row of logits [B, C], C > 1, is non-negative and sums to 1."""
    near = (logits.float().sum(1) - 1).abs() < 1e-3
    return (near & (logits >= 0).all(1)).all() & (logits.shape[1] > 1)


def _check_shapes(x: Tensor, y: Tensor, **magnitudes: float | Tensor) -> None:
    check.tensor("x", x, "a tensor")
    check.tensor("y", y, f"a tensor of integer class labels, here [{len(x) if x.ndim else 0}]")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 or float64, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError("x must be [B, ...], got a scalar")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or y.shape != x.shape[:1]:
        raise ValueError(f"y must be integer class labels [B], here [{len(x)}], got {y.dtype} {list(y.shape)}")
    check.same_device("y", y, "x", x)
    for name, value in magnitudes.items():
        if isinstance(value, Tensor):
            check.shape(name, value, (len(x),), "a number or [B]")


def _check_values(x: Tensor, y: Tensor, bounds: tuple[float, float]) -> None:
    least, greatest = x.aminmax()
    if least.isnan():
        raise ValueError("x must hold no NaN, got one")
    if least < bounds[0] or greatest > bounds[1]:
        raise ValueError(f"x must lie within bounds {bounds}, got min {least.item()} and max {greatest.item()}")
    if y.min() < 0:
        raise ValueError(f"y must be class labels >= 0, got {int(y.min())}")


def _check_logits(logits: Tensor, batch: int, least_classes: int) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != batch:
        came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model must return logits [B, C] with B = {batch}, got {came}")
    check.floating("logits", logits)
    if logits.shape[1] < least_classes:
        raise ValueError(f"y must be less than the {logits.shape[1]} classes of the logits, got {least_classes - 1}")
