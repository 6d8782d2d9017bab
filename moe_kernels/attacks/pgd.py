"""Projected gradient descent in an Lp ball around x: x_adv <- P(x_adv + alpha * direction(d loss / d x_adv))."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kernels.attacks.attack import Attack, Best, magnitude
from moe_kernels.attacks.capture import repeat
from moe_kernels.attacks.losses import Loss, cross_entropy, margin
from moe_kernels.ops.kl_divergence import kl_divergence
from moe_kernels.ops.pgd_step_ import NORMS, norm_name

LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin}


class PGD(Attack):
    """Projected gradient descent (Madry et al. 2018) on any torch model that returns logits.

    The model is attacked in `attack_mode` and left as it was, whatever its own mode and the caller's grad mode. A
    callable that is not a module (such as a lambda around one) is not frozen: call the attack inside
    `attack_mode(module)`. Losses are computed per sample, in fp32 even under autocast, and summed, not averaged, so
    that gradients do not shrink with the batch and underflow in 16 bits. The host waits for the device to check x and
    y, between restarts to see which samples are left, and at the end to read the NaN count, never between steps.

    Args:
        model: maps x to logits [B, C].
        eps: radius of the ball in units of x: a number, a fraction such as "8/255", or a tensor [B].
        alpha: step size, likewise.
        steps: gradient steps; 0 returns the start.
        norm: "Linf", "L2" or "L1", also spelled "linf", float("inf"), "l2", 2, "l1" or 1.
        loss: "ce"; "kl", KL(clean prediction || adversarial prediction) (Zhang et al. 2019); "margin",
            max_{j != y} z_j - z_y (Carlini and Wagner 2017); or a callable (logits, y) -> [B].
        random_start: start uniformly in the ball, clamped to bounds; otherwise at x. For "kl", whose gradient vanishes
            at x, start instead at x + 0.001 (high - low) N(0, 1), projected onto the ball.
        restarts: number of random starts; each sample keeps its best result. A sample that has been fooled takes no
            part in further ones, unless keywords or a callable loss are given, since these may refer to the whole
            batch.
        targeted: y holds the target classes, and the loss is descended.
        bounds: the smallest and largest valid value of x.
        seed: a number makes every call draw the same; None draws fresh entropy. The global random state is neither
            read nor advanced.
        best_iterate: return each sample's best iterate (a success beats a failure, then the loss decides), at the cost
            of one more forward per restart; False returns the last iterate, with restarts that of the best one.
        attack_misclassified: whether samples that are misclassified without an attack (with `targeted`, classified as
            the target) are attacked; if not, they are returned unchanged. Which samples withstand does not depend on
            it. None attacks them in a single run, as training needs, but not with restarts.
        capture: "auto" records the third step as a CUDA graph and replays it from then on, if x is on a GPU; False
            never does. A model that makes the host wait for the device, or draws random numbers on the host, cannot be
            recorded: its steps run one by one, and a warning says why. Ignored with compile=True.
        freeze_routing: take gradients under the route of the clean x, from `model.route(x)`, passed on as
            `model(x, routing=...)`, and judge only the last iterate of each restart, under its own route. A weaker
            attack, since it never aims at the route: for training, not for evaluation.
        recompute: "none", or "activations", which saves memory in a transformer and takes longer; see `attack_mode`.
        compile: take gradients from torch.compile(model) instead of `attack_mode`'s rules; the parameters are frozen
            all the same. The first call compiles, which takes a minute or more; the first with another batch size
            compiles once more, for all further sizes. Pays off for many calls of ten or more steps on small batches;
            docs/attack.md has times.

    Attributes:
        nan_gradients, zero_gradients: in how many (sample, step) pairs of the last call the gradient held a NaN, and in
            how many it was zero everywhere.

    Raises:
        ValueError: if an argument, here or in the call, is not as described.
        RuntimeError: in the call, if torch.compile fails on the model.
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
        attack_misclassified: bool | None = None,
        capture: str | bool = "auto",
        freeze_routing: bool = False,
        recompute: str = "none",
        compile: bool = False,
    ) -> None:
        if norm_name(norm) not in NORMS:
            raise ValueError(f"norm must be 'Linf', 'L2' or 'L1', got {norm!r}")
        if not callable(loss) and loss not in (*LOSSES, "kl"):
            raise ValueError(f"loss must be 'ce', 'kl', 'margin' or a callable (logits, y) -> [B], got {loss!r}")
        if loss == "kl" and targeted:
            raise ValueError("targeted must be False with loss='kl', which has no target class, got True")
        if capture not in ("auto", False):
            raise ValueError(f"capture must be 'auto' or False, got {capture!r}")
        if freeze_routing and not hasattr(model, "route"):
            raise ValueError(f"freeze_routing needs a model with a method route, got {type(model).__name__}")
        super().__init__(model, eps, steps, norm, random_start, restarts, bounds, seed, recompute, compile)
        self.alpha = magnitude("alpha", alpha)
        if self.norm == "Linf" and not isinstance(self.alpha, Tensor) and not isinstance(self.eps, Tensor):
            width = bounds[1] - bounds[0]
            if self.alpha >= width > 2 * self.eps > 0:
                message = f"alpha={self.alpha} spans bounds {bounds} and the ball of eps={self.eps}"
                warnings.warn(f"{message}; write 2/255, not 2", stacklevel=2)
        self.loss = loss
        self.targeted = targeted
        self.best_iterate = best_iterate
        self.attack_misclassified = self.restarts == 1 if attack_misclassified is None else attack_misclassified
        self.capture = capture
        self.freeze_routing = freeze_routing

    def _magnitudes(self) -> dict[str, float | Tensor]:
        return {"eps": self.eps, "alpha": self.alpha}

    def _attack(self, x: Tensor, y: Tensor, kwargs: dict[str, Any]) -> Tensor:
        eps, alpha = (torch.as_tensor(v, dtype=x.dtype, device=x.device).expand(len(x)) for v in (self.eps, self.alpha))
        generator = self._generator(x)

        def run(rows: Any) -> Best:
            return self._run(x[rows], y[rows], eps[rows], alpha[rows], generator, kwargs)

        if self.restarts == 1 and self.attack_misclassified:
            return run(slice(None)).x
        return self._best_of([run] * self.restarts, x, y, kwargs)

    def _run(
        self, x: Tensor, y: Tensor, eps: Tensor, alpha: Tensor, generator: torch.Generator, kwargs: dict[str, Any]
    ) -> Best:
        if isinstance(self.loss, str):
            loss = self._kl_to(x, kwargs) if self.loss == "kl" else LOSSES[self.loss]
        else:
            loss = self.loss
        routed = kwargs
        if self.freeze_routing:
            with torch.no_grad():
                routed = {"routing": self.model.route(x)} | kwargs  # type: ignore[attr-defined]
        x_adv = self.start(x, eps, generator)
        best = Best(x_adv)

        def step() -> None:
            leaf = x_adv.detach().requires_grad_()
            objective, success = self._evaluate(leaf, y, loss, routed)
            grad = self._gradient(objective, leaf)
            if self.best_iterate and not self.freeze_routing:
                best.offer(x_adv, objective.detach(), success)
            self._step(x_adv, grad, x, eps, alpha)

        repeat(step, self.steps, x.device if self.capture == "auto" and not self.compile and x.is_cuda else None)
        if self.restarts == 1 and self.attack_misclassified and not self.best_iterate:
            best.x = x_adv  # saves a forward
        else:
            with torch.no_grad():
                best.offer(x_adv, *self._evaluate(x_adv, y, loss, kwargs))
        return best

    def start(self, x: Tensor, eps: Tensor, generator: torch.Generator) -> Tensor:
        """The starting point of a restart, for eps [B]; a subclass may choose another one in the ball."""
        if self.random_start:
            return self._uniform_start(x, eps, generator)
        if self.loss == "kl":
            width = self.bounds[1] - self.bounds[0]
            return self._projected(x + 0.001 * width * torch.empty_like(x).normal_(generator=generator), x, eps)
        return x.clone()

    def _kl_to(self, x: Tensor, kwargs: dict[str, Any]) -> Loss:
        with torch.no_grad():
            clean = self._logits(x, kwargs)
        return lambda logits, y: kl_divergence(clean, logits)
