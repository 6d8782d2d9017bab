"""Projected gradient descent in an Lp ball around x: x_adv <- P(x_adv + alpha * direction(d loss / d x_adv))."""

import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels import _checks as check
from moe_kernels.attacks.attack_mode import attack_mode
from moe_kernels.ops.kl_divergence import kl_divergence
from moe_kernels.ops.pgd_step_ import pgd_step_

Loss = Callable[[Tensor, Tensor], Tensor]  # logits [B, C], y [B] -> [B]


class PGD:
    """Projected gradient descent (Madry et al. 2018) on any torch model that returns logits.

    The model is attacked in `attack_mode` and is left as it was, in whichever mode and under whichever grad mode the
    call is made. A callable that is no module (a lambda around one, say) is not frozen: enter `attack_mode(module)`
    around the call. Losses are per sample, in fp32 under autocast too, and summed, so that gradients do not shrink with
    the batch and underflow in 16 bits. The host waits for the device only to check x and y at the start and to read the
    NaN count at the end, never between steps.

    Args:
        model: maps x to logits [B, C].
        eps: radius of the ball in units of x: a number, a fraction such as "8/255", or a tensor [B].
        alpha: step size, likewise.
        steps: gradient steps; 0 returns the start.
        norm: "Linf", "L2" or "L1".
        loss: "ce"; "kl", KL(clean prediction || adversarial prediction) (Zhang et al. 2019); "margin",
            max_{j != y} z_j - z_y (Carlini and Wagner 2017); or a callable (logits, y) -> [B].
        random_start: start uniformly in the ball, clamped to bounds; otherwise at x ("kl", whose gradient vanishes
            there, 0.001 N(0, 1) of the bounds' width away from it, within the ball).
        restarts: random starts, of which each sample keeps its best.
        targeted: y holds the classes to reach; the loss is descended.
        bounds: the least and the greatest value of x.
        seed: None starts from fresh entropy; a number makes every call repeat itself. The global random state is
            neither read nor advanced.
        best_iterate: return each sample's best iterate, successful ones before others, then by loss, at the price of
            one more forward per restart; False returns the last iterate (of its best restart, if there are several).

    Attributes:
        nan_gradients, zero_gradients: how many (sample, step) pairs of the last call had a gradient with a NaN, and
            one that was zero everywhere.

    Raises:
        ValueError: if an argument, here or in the call, is not as described.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        eps: float | str | Tensor = 8 / 255,
        alpha: float | str | Tensor = 2 / 255,
        steps: int = 10,
        norm: str = "Linf",
        loss: str | Loss = "ce",
        random_start: bool = True,
        restarts: int = 1,
        targeted: bool = False,
        bounds: tuple[float, float] = (0, 1),
        seed: int | None = None,
        *,
        best_iterate: bool = True,
    ) -> None:
        if norm not in ("Linf", "L2", "L1"):
            raise ValueError(f"norm must be 'Linf', 'L2' or 'L1', got {norm!r}")
        if not callable(loss) and loss not in ("ce", "kl", "margin"):
            raise ValueError(f"loss must be 'ce', 'kl', 'margin' or a callable (logits, y) -> [B], got {loss!r}")
        if loss == "kl" and targeted:
            raise ValueError("targeted must be False with loss='kl', which knows no target class, got True")
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps must be an integer >= 0, got {steps!r}")
        if not isinstance(restarts, int) or restarts < 1:
            raise ValueError(f"restarts must be an integer >= 1, got {restarts!r}")
        if restarts > 1 and not random_start:
            raise ValueError(f"restarts must be 1 without random_start, since all would be equal, got {restarts}")
        if not bounds[0] < bounds[1]:
            raise ValueError(f"bounds must be (low, high) with low < high, got {bounds!r}")
        self.model = model
        self.eps = _magnitude("eps", eps)
        self.alpha = _magnitude("alpha", alpha)
        self.steps = steps
        self.norm = norm
        self.loss = loss
        self.random_start = random_start
        self.restarts = restarts
        self.targeted = targeted
        self.bounds = bounds
        self.seed = seed
        self.best_iterate = best_iterate
        self._counts = torch.zeros(2, dtype=torch.int64)
        if norm == "Linf" and not isinstance(self.eps, Tensor):
            if self.eps > bounds[1] - bounds[0]:
                warnings.warn(f"eps={self.eps} is wider than bounds {bounds}; is 8/255 meant by 8?", stacklevel=2)
            if self.eps == 0.031:
                warnings.warn("eps=0.031 is not 8/255 = 0.03137..., which published results use", stacklevel=2)

    @property
    def nan_gradients(self) -> int:
        return int(self._counts[0])

    @property
    def zero_gradients(self) -> int:
        return int(self._counts[1])

    def __call__(self, x: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
        """Attacks a batch.

        Args:
            x: float32 or float64 [B, ...] within bounds. 16-bit images are refused, since an eps ball is finer than
                they are; run the model under autocast instead, which the attack follows.
            y: integer [B], true classes, or target classes if targeted.
            kwargs: passed on to the model, e.g. routing=... to attack under a forced route.

        Returns:
            x_adv, detached, with the dtype, shape and memory format of x; x itself if the batch is empty.

        Raises:
            ValueError: if x, y, eps, alpha, the logits or the losses do not match, or if the logits do not depend on x
                through differentiable operations.
        """
        _check_shapes(x, y, eps=self.eps, alpha=self.alpha)
        self._counts = torch.zeros(2, dtype=torch.int64, device=x.device)
        if x.numel() == 0:
            return x.detach()
        _check_values(x, y, self.bounds)
        with torch.inference_mode(False), torch.enable_grad(), attack_mode(self.model):
            x_adv = self._attack(x.detach(), y.to(torch.int64, copy=True), kwargs)
        if self.nan_gradients:
            message = f"{self.nan_gradients} of {self.steps * self.restarts * len(x)} gradients held a NaN"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return x_adv

    def _attack(self, x: Tensor, y: Tensor, kwargs: dict[str, Any]) -> Tensor:
        eps, alpha = (torch.as_tensor(v, dtype=x.dtype, device=x.device).expand(len(x)) for v in (self.eps, self.alpha))
        least_classes = int(y.max()) + 1
        generator = torch.Generator(x.device)
        generator.seed() if self.seed is None else generator.manual_seed(self.seed)

        def forward(x: Tensor) -> Tensor:
            logits = self.model(x, **kwargs)
            _check_logits(logits, len(y), least_classes)
            return logits.to(torch.promote_types(logits.dtype, torch.float32))

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            """The objective to ascend and whether the attack has succeeded, both [B]."""
            logits = forward(x)
            with torch.autocast(x.device.type, enabled=False):
                losses = loss(logits, y)
            if losses.shape != y.shape:
                raise ValueError(f"loss must return one value per sample, [{len(y)}], got {list(losses.shape)}")
            return (-losses if self.targeted else losses), (logits.argmax(1) == y) == self.targeted

        if isinstance(self.loss, str):
            loss = _kl_to(forward, x) if self.loss == "kl" else _LOSSES[self.loss]
        else:
            loss = self.loss
        best: _Best | None = None
        for _ in range(self.restarts):
            x_adv = self.start(x, eps, generator)
            best = best or _Best(x_adv)
            for _ in range(self.steps):
                leaf = x_adv.detach().requires_grad_()
                objective, success = evaluate(leaf)
                grad = self._gradient(objective, leaf)
                if self.best_iterate:
                    best.offer(x_adv, objective.detach(), success)
                pgd_step_(x_adv, grad, x, eps, alpha, self.norm, self.bounds)
            if self.restarts == 1 and not self.best_iterate:
                return x_adv
            with torch.no_grad():
                best.offer(x_adv, *evaluate(x_adv))
        assert best is not None
        return best.x

    def start(self, x: Tensor, eps: Tensor, generator: torch.Generator) -> Tensor:
        """Where a restart begins, eps being [B]; a subclass may begin elsewhere in the ball."""
        if self.random_start:
            offset = _per_sample(eps, x) * _uniform_in_unit_ball(x, self.norm, generator)
        elif self.loss == "kl":
            offset = 0.001 * (self.bounds[1] - self.bounds[0]) * torch.empty_like(x).normal_(generator=generator)
        else:
            return x.clone()
        return pgd_step_(x + offset, torch.zeros_like(x), x, eps, 0.0, self.norm, self.bounds)  # projects and clamps

    def _gradient(self, objective: Tensor, leaf: Tensor) -> Tensor:
        grad = torch.autograd.grad(objective.sum(), [leaf], allow_unused=True)[0] if objective.requires_grad else None
        if grad is None:
            raise ValueError("model must return logits that depend on x through differentiable operations, got none")
        largest = torch.linalg.vector_norm(grad.reshape(len(grad), -1), torch.inf, dim=1)  # NaN where there is one
        self._counts = self._counts + torch.stack([largest.isnan().sum(), (largest == 0).sum()])
        return grad


class _Best:
    """Per sample the strongest candidate offered: a success before a failure, then the greater objective."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.clone()
        self.objective = x.new_full((len(x),), -math.inf)
        self.success = torch.zeros_like(self.objective, dtype=torch.bool)

    def offer(self, x: Tensor, objective: Tensor, success: Tensor) -> None:
        greater = (success == self.success) & (objective > self.objective)  # a NaN objective never is
        better = greater | (success & ~self.success)
        torch.where(_per_sample(better, x), x, self.x, out=self.x)
        self.objective = torch.where(better, objective.nan_to_num(-math.inf, math.inf, -math.inf), self.objective)
        self.success |= success


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    others = logits.scatter(1, y[:, None], -math.inf).amax(1)
    return others - logits.gather(1, y[:, None]).squeeze(1)


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


_LOSSES: dict[str, Loss] = {"ce": _cross_entropy, "margin": _margin}


def _kl_to(forward: Callable[[Tensor], Tensor], x: Tensor) -> Loss:
    with torch.no_grad():
        clean = forward(x)
    return lambda logits, y: kl_divergence(clean, logits)


def _per_sample(value: Tensor, x: Tensor) -> Tensor:
    """[B] shaped to broadcast against x [B, ...]."""
    return value.view(-1, *[1] * (x.ndim - 1))


def _uniform_in_unit_ball(x: Tensor, norm: str, generator: torch.Generator) -> Tensor:
    """One point per sample, in the shape of x [B, ...].

    For p = 1, 2: g / (sum |g|^p + z)^(1/p), where g has a density proportional to exp(-|g|^p) and z ~ Exp(1) (Barthe,
    Guedon, Mendelson and Naor, "A probabilistic approach to the geometry of the l_p^n-ball", 2005, theorem 1).
    """
    if norm == "Linf":
        return torch.empty_like(x).uniform_(-1, 1, generator=generator)
    z = x.new_empty(len(x)).exponential_(generator=generator)
    if norm == "L2":
        g = torch.empty_like(x).normal_(0, math.sqrt(0.5), generator=generator)
        return g / _per_sample((g.square().reshape(len(x), -1).sum(1) + z).sqrt(), x)
    g = torch.empty_like(x).exponential_(generator=generator) - torch.empty_like(x).exponential_(generator=generator)
    return g / _per_sample(g.abs().reshape(len(x), -1).sum(1) + z, x)


def _magnitude(name: str, value: float | str | Tensor) -> float | Tensor:
    try:
        number = float(Fraction(value)) if isinstance(value, str) else value
        valid = bool(torch.as_tensor(number).isfinite().all() and (torch.as_tensor(number) >= 0).all())
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError):
        valid = False
    if not valid:
        raise ValueError(f"{name} must be finite and >= 0: a number, a fraction '8/255' or a tensor [B], got {value!r}")
    return number


def _check_shapes(x: Tensor, y: Tensor, **magnitudes: float | Tensor) -> None:
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
        raise ValueError(f"x must lie within bounds {bounds}, got min {least:.6g} and max {greatest:.6g}")
    if y.min() < 0:
        raise ValueError(f"y must be class labels >= 0, got {int(y.min())}")


def _check_logits(logits: Tensor, batch: int, least_classes: int) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != batch:
        came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model must return logits [B, C] with B = {batch}, got {came}")
    check.floating("logits", logits)
    if logits.shape[1] < least_classes:
        raise ValueError(f"y must be less than the {logits.shape[1]} classes of the logits, got {least_classes - 1}")
