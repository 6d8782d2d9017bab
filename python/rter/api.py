"""The application from Python: the model of a run, and the evaluation of any model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rter.checkpoint import demand_no_run
from rter.console import say
from rter.data.load import load_data
from rter.data.split import Split
from rter.errors import UserError
from rter.evaluate import JOURNAL, TrainedRun, examples, measure
from rter.evaluation import Evaluation, eval_mode
from rter.journal import seeded
from rter.measured import Report
from rter.models.adapted import adapt
from rter.strength import BATCH, QUERIES, make_strength
from rter.suite import DRAWS, is_deterministic

__all__ = ["Report", "UserError", "evaluate_model", "load_data", "load_model"]
WEIGHTS = ("last", "best")


def load_model(
    run: str | Path, weights: str = "last", *, data_dir: str | None = None, device: str | None = None
) -> nn.Module:
    """The model that `rter train` has trained, in eval mode.

    Args:
        run: folder of the run.
        weights: "last", or "best", chosen on the held-out images.
        data_dir: folder of the data set's files, if they have moved since training; the number of classes and the size
            of the images are read from them.
        device: "cpu", "cuda" or "cuda:N"; None for a GPU, if there is one.

    Returns:
        A module from images [B, C, H, W] in [0, 1] to logits [B, classes], with `num_experts`, `route(x)` and
        `forward(x, routing=...)` as `moe_kernels.RobustMoE` has them.

    Raises:
        UserError: if the folder holds no run, or the run's data or weights are missing.
    """
    if weights not in WEIGHTS:
        raise UserError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    return TrainedRun(Path(run), weights, data_dir=data_dir, device=device).load()[2]


def evaluate_model(
    model: Callable[..., Any],
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    norm: str = "Linf",
    suite: str = "full",
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
    steps: int = 50,
    restarts: int | None = None,
    queries: int = QUERIES,
    about: dict[str, Any] | None = None,
) -> Report:
    """Attacks a model by PGD, APGD and AutoAttack, and its route, where it has one, by the attacks that know routes.

    Args:
        model: maps images [B, C, H, W] to logits [B, classes], or to an object with an attribute `logits`. A module is
            evaluated in eval mode and is left as it was. Its route is attacked if it offers `num_experts`, `route(x)`
            and `forward(x, routing=...)`, as `moe_kernels.RobustMoE` does, or has one RobustMoE inside.
        x: images [n, C, H, W] within bounds, floats.
        y: classes [n], integers.
        eps: radius of the perturbation in units of x: a number, or a fraction such as "8/255".
        norm: "Linf", "L2" or "L1".
        suite: "pgd", that attack alone; "quick"; or "full", which adds AutoAttack and every attack on the route.
        bounds: the least and the greatest value of an image.
        batch_size: images that are attacked at a time.
        seed: of all random starts; the same seed gives the same report, bit for bit, on the same machine.
        out: a folder for report.json and examples.safetensors. Until they are written, it holds every finished batch of
            every attack, so that repeating a call that was killed resumes it. Once they are, it returns them.
        progress: show how far each attack is: a bar at a terminal, elsewhere a line every 30 s.
        steps: of PGD and APGD.
        restarts: of PGD on the whole model; None for 1, 5 or 20, in the suites pgd, quick and full.
        queries: of AutoAttack's Square.
        about: further entries for report.json that describe the model and its data, such as "method" and "data".

    Raises:
        UserError: if an argument, which the message names, is not as described, or if `out` holds the evaluation of
            another model, of other images or with other settings, finished or not.
    """
    if out is not None:
        demand_no_run(Path(out))
    strength = make_strength(eps, norm, suite, bounds, batch_size, seed, steps, restarts, queries)
    x, y = _images(x, y, bounds)
    like = next(model.parameters(), x) if isinstance(model, nn.Module) else x
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    x, y = x.to(like.device, dtype), y.to(like.device)
    width = bounds[1] - bounds[0]
    unit = x if tuple(bounds) == (0, 1) else ((x - bounds[0]) / width).clamp(0, 1)
    with eval_mode(model), seeded(seed, x.device):
        adapted, routes = adapt(model, unit[:2], (bounds[0], bounds[1]))
        with torch.no_grad():
            classes = adapted(unit[:1]).shape[1]
        if int(y.max()) >= classes:
            raise UserError(f"y must be less than the {classes} classes of the model's logits, got {int(y.max())}")
        file = None if out is None else Path(out) / JOURNAL
        evaluation = Evaluation(adapted, Split(unit, y), strength, file, progress)
        if out is not None and (before := Report.finished(out, evaluation)):
            return before
        if progress and not is_deterministic(evaluation):
            say(f"the model's output is random: it is attacked through the mean of {DRAWS} draws")
        figures = measure(evaluation)
        found = examples(evaluation)
    for key in ("x", "x_adv"):
        found[key] = bounds[0] + width * found[key]
    figures["eps_curve"] = [[width * radius, accuracy] for radius, accuracy in figures["eps_curve"]]
    report = Report(
        {
            "method": type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "model"),
            "data": None,
            "seed": seed,
            "norm": norm,
            "eps": width * strength.eps,
            "bounds": list(bounds),
            "num_experts": evaluation.num_experts,
            "routes": routes,
            "epochs": 0,
            "train_seconds": None,
            "weights": None,
            "split": "given",
            "held_out": len(y),
            "sample": None,
            **(about or {}),
            **figures,
        },
        found,
        evaluation.outcomes,
    )
    if out is not None:
        report.save(out)
        evaluation.journal.finish()
    return report


def _images(x: Any, y: Any, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    try:
        x, y = torch.as_tensor(x), torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"x and y must be tensors: {' '.join(str(error).split())}") from None
    if x.ndim != 4 or not len(x):
        raise UserError(f"x must be images [n, C, H, W], at least one, got shape {list(x.shape)}")
    if not x.is_floating_point():
        raise UserError(f"x must be floats within bounds {bounds}, got {x.dtype}: divide 8-bit images by 255")
    if y.shape != x.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
        raise UserError(f"y must be {len(x)} integer classes, one for each image, got {y.dtype} {list(y.shape)}")
    least, greatest = x.aminmax()
    if not (least >= bounds[0] and greatest <= bounds[1]):
        raise UserError(f"x must lie within bounds {bounds}, got values from {least:.9g} to {greatest:.9g}")
    if y.min() < 0:
        raise UserError(f"y must be classes, at least 0, got {int(y.min())}")
    return x, y.long()
