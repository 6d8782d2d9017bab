"""How accurate and how robust a model is, on the held-out images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rter.checkpoint import load_weights, read_lines, run_config, save_tensors, write_json
from rter.config import Config
from rter.data import Data, Split, load_data
from rter.methods.step import make_attack
from rter.models import RobustClassifier, View, build_model

BATCH = 512
CURVE = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)  # eps, in units of the run's


@dataclass(frozen=True)
class Attacked:
    """The images that an attack found, and whether it failed to change each prediction from the label."""

    x: Tensor  # [n, C, H, W]
    robust: Tensor  # [n] bool


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(BATCH)]).argmax(-1)


@torch.no_grad()
def routed_to(model: RobustClassifier, x: Tensor) -> Tensor:
    """The expert of each image, [n] int64."""
    return torch.cat([model.route(part).experts[:, 0] for part in x.split(BATCH)]).long()


def attack(
    model: nn.Module, config: Config, images: Split, name: str, *, eps: float, steps: int, restarts: int = 1
) -> Attacked:
    """PGD with restarts: each further start is spent only on the images that have withstood so far."""
    x, robust = images.x.clone(), predict(model, images.x) == images.y
    rows = torch.arange(len(images))
    for restart in range(restarts):
        for i, part in enumerate(rows[robust | (restart == 0)].split(BATCH)):
            pgd = make_attack(model, config, eps, steps, name, restart, i)
            x[part] = pgd(images.x[part], images.y[part])
            robust[part] &= predict(model, x[part]) == images.y[part]
    return Attacked(x, robust)


def quick_accuracies(model: RobustClassifier, config: Config, images: Split) -> dict[str, float]:
    """Clean accuracy, and accuracy under the training attack from a start of its own."""
    model.eval()
    found = attack(model, config, images, "quick", eps=config.eps, steps=config.attack_steps)
    return {"sa": _mean(predict(model, images.x) == images.y), "ra": _mean(found.robust)}


def evaluate(run: Path, weights: str, steps: int, restarts: int) -> dict[str, Any]:
    """Measures the run's `last` or `best` weights by PGD; writes report.json and examples.safetensors."""
    config = run_config(run)
    data = load_data(config.data, config.held_out, config.seed, config.data_dir, config.image_size)
    model = build_model(config, data)
    load_weights(run / f"{weights}.safetensors", model)
    model.eval()
    results, adversarial = measure(model, config, data.test, steps, restarts)
    report = {
        "method": config.method,
        "data": config.data,
        "seed": config.seed,
        "norm": config.norm,
        "eps": config.eps,
        "num_experts": config.num_experts,
        "epochs": config.epochs,
        "train_seconds": read_lines(run / "metrics.jsonl")[-1]["seconds"],
        "weights": weights,
        "split": "held-out" if data.official_test is None else "test",
        "held_out": len(data.test),
        "attack": {"name": "PGD", "steps": steps, "alpha_ratio": config.alpha_ratio, "restarts": restarts},
        "torch": torch.__version__,
        **results,
        "baselines": {},
    }
    write_json(run / "report.json", report)
    save_tensors(run / "examples.safetensors", examples(model, data, adversarial))
    return report


def measure(
    model: RobustClassifier, config: Config, images: Split, steps: int, restarts: int
) -> tuple[dict[str, Any], Tensor]:
    """The figures of report.json, and the images [n, C, H, W] that the attack on the whole model found.

    sa                       accuracy on clean images
    ra                       of the whole model, under PGD with restarts on the whole model
    ra_e                     of each expert alone, under PGD on that expert
    ra_r                     of the whole model, under PGD on the router's choice; None for one expert
    aa                       AutoAttack: not measured
    worst                    of the whole model, when each image meets the worst of ra's attack and of those on the
                             experts and on the mean of their logits
    expert_load              part of the images that each expert gets, clean and under ra's attack
    route_flip_rate          part of the images that change expert, under the router's attack and under ra's
    eps_curve                [eps, accuracy] pairs; what breaks at one eps counts as broken at every larger one
    """

    def attacked(target: nn.Module, name: str, restarts: int = 1, y: Tensor = images.y) -> Attacked:
        return attack(target, config, Split(images.x, y), name, eps=config.eps, steps=steps, restarts=restarts)

    clean_route = routed_to(model, images.x)
    whole = attacked(model, "whole", restarts)
    alone = [attacked(expert_alone(model, e), f"expert {e}") for e in range(model.num_experts)]
    average = attacked(View(model, _mean_of_experts), "average")
    worst = whole.robust.clone()
    for found in (*alone, average):
        worst &= predict(model, found.x) == images.y
    several = model.num_experts > 1
    router = attacked(View(model, _router_logits), "router", y=clean_route) if several else None
    return {
        "sa": _mean(predict(model, images.x) == images.y),
        "ra": _mean(whole.robust),
        "ra_e": [_mean(found.robust) for found in alone],
        "ra_r": _mean(predict(model, router.x) == images.y) if router else None,
        "aa": None,
        "worst": _mean(worst),
        "expert_load": _load(clean_route, model.num_experts),
        "expert_load_adversarial": _load(routed_to(model, whole.x), model.num_experts),
        "route_flip_rate": _mean(~router.robust) if router else 0.0,
        "route_flip_rate_whole": _mean(routed_to(model, whole.x) != clean_route),
        "eps_curve": eps_curve(model, config, images, steps, whole.robust),
    }, whole.x


def eps_curve(
    model: RobustClassifier, config: Config, images: Split, steps: int, robust: Tensor
) -> list[tuple[float, float]]:
    """Accuracy against eps. `robust` holds the images known to withstand the run's own eps."""
    standing = predict(model, images.x) == images.y
    curve = [(0.0, _mean(standing))]
    for ratio in CURVE:
        if config.norm == "Linf" and ratio * config.eps > 1:
            break
        if ratio == 1:
            standing &= robust
        elif standing.any():
            eps = ratio * config.eps
            standing[standing.clone()] = attack(
                model, config, images[standing], f"curve {ratio}", eps=eps, steps=steps
            ).robust
        curve.append((ratio * config.eps, _mean(standing)))
    return curve


def expert_alone(model: RobustClassifier, expert: int) -> View:
    return View(model, lambda model, x: model(x, routing=model.route(x).fixed(expert)))


def _mean_of_experts(model: RobustClassifier, x: Tensor) -> Tensor:
    route = model.route(x)
    return torch.stack([model(x, routing=route.fixed(e)) for e in range(model.num_experts)]).mean(0)


def _router_logits(model: RobustClassifier, x: Tensor) -> Tensor:
    return model.route(x).logits


def examples(model: RobustClassifier, data: Data, adversarial: Tensor) -> dict[str, Tensor]:
    """The first test image of each class, its adversarial twin, and what the model says to both."""
    test = data.test
    rows = torch.cat([(test.y == label).nonzero()[:1, 0] for label in range(data.num_classes)])
    x, x_adv = test[rows].x, adversarial[rows]
    return {
        "x": x,
        "x_adv": x_adv,
        "label": test.y[rows],
        "clean": predict(model, x),
        "adversarial": predict(model, x_adv),
    }


def _load(experts: Tensor, num_experts: int) -> list[float]:
    return (torch.bincount(experts, minlength=num_experts) / len(experts)).tolist()


def _mean(flags: Tensor) -> float:
    return flags.double().mean().item()
