"""Auto-PGD: momentum, and a step size that is halved whenever the ascent stalls, which then restarts at its best point.

z_k = P(x_k + eta_k direction(grad_k));  x_{k+1} = P(x_k + 3/4 (z_k - x_k) + 1/4 (x_k - x_{k-1})),  eta_0 = 2 eps
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moe_kernels import _checks as check
from moe_kernels.attacks.attack import Attack, Best, per_sample
from moe_kernels.attacks.losses import Loss, check_classes, cross_entropy, dlr, dlr_towards, margin
from moe_kernels.ops.pgd_step_ import norm_name

Goal = Callable[[Tensor], tuple[Tensor, Tensor]]  # x [B, ...] -> objective to ascend [B], success [B]

LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr, "margin": margin}
MOMENTUM = 0.25
IMPROVING = 0.75  # the step size is halved unless this fraction of the steps raised the loss


class APGD(Attack):
    """Auto-PGD (Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks", 2020, algorithm 1) on any torch model that returns logits.

    There is no step size to choose: at fixed checkpoints, a sample whose loss has stalled halves its own and goes on
    from its best point. The model is attacked in `attack_mode`, as by `PGD`; the host waits for the device before and
    after a run of steps, never between them. A sample that is misclassified without an attack, or has been fooled,
    takes no part in further runs, unless keywords or a callable loss are given, since these may refer to the whole
    batch. The processes of FSDP must all make the same forwards, so they need a single run with
    attack_misclassified=True.

    Args:
        model: maps x to logits [B, C].
        eps: radius of the ball in units of x: a number, a fraction such as "8/255", or a tensor [B].
        steps: gradient steps of one run; 0 returns the start.
        loss: "ce"; "dlr" (at least 3 classes); "dlr_targeted" (at least 4), one run towards each of the
            n_target_classes likeliest other classes; "margin", max_{j != y} z_j - z_y; or a callable
            (logits, y) -> [B].
        norm: "Linf" or "L2", also spelled "linf", float("inf"), "l2" or 2.
        random_start: start uniformly in the ball, clamped to bounds; otherwise at x.
        restarts: number of random starts; each sample keeps its best result.
        n_target_classes: for "dlr_targeted"; capped at the number of other classes, C - 1.
        bounds: the smallest and largest valid value of x.
        seed: a number makes every call draw the same; None draws fresh entropy. The global random state is neither
            read nor advanced.
        draws: forwards per gradient, for a model that is random in eval mode; loss and gradient are averaged over them
            (expectation over transformation, Athalye et al. 2018), and an attack succeeds if it does in most of them.
        attack_misclassified: whether samples that are misclassified without an attack take part in the first run; if
            not, they are returned unchanged. Which samples withstand does not depend on it.
        recompute: "none", or "activations", which saves memory in a transformer and takes longer; see `attack_mode`.
        compile: compute the gradient steps by torch.compile(model), as in `PGD`.

    Attributes:
        nan_gradients, zero_gradients: as in `PGD`.

    Raises:
        ValueError: if an argument, here or in the call, is not as described.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        eps: float | str | Tensor = 8 / 255,
        *,
        steps: int = 100,
        loss: str | Loss = "ce",
        norm: str = "Linf",
        random_start: bool = True,
        restarts: int = 1,
        n_target_classes: int = 9,
        bounds: tuple[float, float] = (0, 1),
        seed: int | None = None,
        draws: int = 1,
        attack_misclassified: bool = False,
        recompute: str = "none",
        compile: bool = False,
    ) -> None:
        if norm_name(norm) not in ("Linf", "L2"):
            raise ValueError(f"norm must be 'Linf' or 'L2', got {norm!r}")
        if not callable(loss) and loss not in (*LOSSES, "dlr_targeted"):
            expected = "'ce', 'dlr', 'dlr_targeted', 'margin' or a callable (logits, y) -> [B]"
            raise ValueError(f"loss must be {expected}, got {loss!r}")
        super().__init__(model, eps, steps, norm, random_start, restarts, bounds, seed, recompute, compile)
        self.loss = loss
        self.n_target_classes = check.count("n_target_classes", n_target_classes, 1)
        self.draws = check.count("draws", draws, 1)
        self.attack_misclassified = attack_misclassified

    def _attack(self, x: Tensor, y: Tensor, kwargs: dict[str, Any]) -> Tensor:
        eps = torch.as_tensor(self.eps, dtype=x.dtype, device=x.device).expand(len(x))
        generator = self._generator(x)

        def ascent(goal: Callable[[Any], Any]) -> Callable[[Any], Best]:
            def run(rows: Any) -> Best:
                start = self._uniform_start(x[rows], eps[rows], generator) if self.random_start else x[rows]
                return self._ascend(start, x[rows], eps[rows], goal(rows))

            return run

        return self._best_of(map(ascent, self._goals(x, y, kwargs)), x, y, kwargs)

    def _goals(self, x: Tensor, y: Tensor, kwargs: dict[str, Any]) -> Iterator[Callable[[Tensor], Goal]]:
        """Yields one function per run, from rows of the batch to the goal that they ascend."""
        if self.loss != "dlr_targeted":
            loss = LOSSES[self.loss] if isinstance(self.loss, str) else self.loss
            for _ in range(self.restarts):
                yield lambda rows: lambda x: self._evaluate(x, y[rows], loss, kwargs)
            return
        with torch.no_grad():
            logits = self._logits(x, kwargs)
        check_classes("dlr_targeted", logits, 4)
        others = logits.scatter(1, y[:, None], -torch.inf)
        targets = others.topk(min(self.n_target_classes, logits.shape[1] - 1), dim=1).indices
        for _ in range(self.restarts):
            for target in targets.unbind(1):
                yield lambda rows, to=target: lambda x: self._evaluate(x, y[rows], dlr_towards(to[rows]), kwargs)  # type: ignore[misc]

    def _ascend(self, x_adv: Tensor, x: Tensor, eps: Tensor, goal: Goal) -> Best:
        """One run of steps from x_adv; returns the best iterates."""
        best = Best(x_adv)
        objective, success, grad = self._slope(x_adv, goal, with_gradient=self.steps > 0)
        best.offer(x_adv, objective, success)
        peak, peak_grad, peak_objective = x_adv, grad, objective  # as `best`, but by the objective alone
        previous, eta = x_adv, 2 * eps
        checked, halved, raised = peak_objective, torch.ones_like(success), torch.zeros_like(eps)
        checkpoints = dict(_checkpoints(self.steps))
        for step in range(1, self.steps + 1):
            z = self._step(x_adv.clone(), grad, x, eps, eta)
            momentum = MOMENTUM if step > 1 else 0.0
            moved = x_adv + (1 - momentum) * (z - x_adv) + momentum * (x_adv - previous)
            previous, x_adv = x_adv, self._projected(moved, x, eps)
            before = objective
            objective, success, grad = self._slope(x_adv, goal, with_gradient=step < self.steps)
            best.offer(x_adv, objective, success)
            raised += objective > before
            higher = objective > peak_objective
            peak, peak_grad = _pick(higher, x_adv, peak), _pick(higher, grad, peak_grad)
            peak_objective = torch.where(higher, objective, peak_objective)
            if step in checkpoints:
                halved = (raised < IMPROVING * checkpoints[step]) | (~halved & (peak_objective <= checked))
                eta = torch.where(halved, eta / 2, eta)
                x_adv, grad = _pick(halved, peak, x_adv), _pick(halved, peak_grad, grad)
                objective = torch.where(halved, peak_objective, objective)
                checked, raised = peak_objective, torch.zeros_like(eps)
        return best

    def _slope(self, x: Tensor, goal: Goal, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Objective [B], success [B] and the gradient (or zeros) at x, over the draws of a random model."""
        objectives, successes, total = [], [], torch.zeros_like(x)
        for _ in range(self.draws):
            leaf = x.detach().requires_grad_(with_gradient)
            with torch.set_grad_enabled(with_gradient):
                objective, success = goal(leaf)
            if with_gradient:
                total += self._gradient(objective, leaf)
            objectives.append(objective.detach().to(x.dtype))
            successes.append(success)
        return torch.stack(objectives).mean(0), 2 * torch.stack(successes).sum(0) > self.draws, total


def _pick(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(per_sample(condition, yes), yes, no)


def _checkpoints(steps: int) -> Iterator[tuple[int, int]]:
    """Pairs (step, steps since the last checkpoint), at the fractions p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06).

    Each interval is a whole number of steps, at least one: 22, 19, 16, ... for 100 steps.
    """
    width, least, less = (max(int(part * steps), 1) for part in (0.22, 0.06, 0.03))
    last = 0
    while last + width <= steps:
        last += width
        yield last, width
        width = max(width - less, least)
