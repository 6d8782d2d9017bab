"""How accurate and how robust a model is, on the held-out images."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels.attacks import RouterLogits
from rter.alpha import alpha_curve
from rter.autoattack import QUERIES, auto_attack
from rter.certificate import affine_router, paper_certificate, route_radius
from rter.checkpoint import load_weights, read_lines, run_config, save_tensors, write_json
from rter.config import Config
from rter.data import Split, load_data
from rter.distributed import device
from rter.intervals import wilson
from rter.models import DualClassifier, RobustClassifier, View, build_model
from rter.suite import BATCH, Attacked, Tally, apgd_attacks, attack, found_by, is_deterministic, mean, predict

CURVE = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)  # eps, in units of the run's


@torch.no_grad()
def routed_to(model: RobustClassifier, x: Tensor) -> Tensor:
    """The expert of each image, [n] int64."""
    return torch.cat([model.route(part).experts[:, 0] for part in x.split(BATCH)]).long()


def quick_accuracies(model: RobustClassifier, config: Config, images: Split) -> dict[str, float]:
    """Clean accuracy, and accuracy under the training attack from a start of its own."""
    model.eval()
    found = attack(model, config, images, "quick", eps=config.eps, steps=config.attack_steps)
    return {"sa": mean(predict(model, images.x) == images.y), "ra": mean(found.robust)}


def evaluate(
    run: Path,
    weights: str,
    steps: int,
    restarts: int,
    suite: str = "full",
    queries: int = QUERIES,
    count: int | None = None,
) -> dict[str, Any]:
    """Attacks the run's `last` or `best` weights with a suite; writes report.json and examples.safetensors.

    With `count` on so many of the test images, drawn by the run's seed in the proportions of the classes.
    """
    config = run_config(run)
    data = load_data(config.data, config.held_out, config.seed, config.data_dir, config.image_size).to(device())
    test = data.test if count is None else data.test.sample(count, config.seed)
    model = build_model(config, data).to(device())
    load_weights(run / f"{weights}.safetensors", model)
    model.eval()
    history = read_lines(run / "metrics.jsonl")
    results, adversarial = measure(model, config, test, steps, restarts, suite, queries)
    report = {
        "method": config.method,
        "data": config.data,
        "seed": config.seed,
        "norm": config.norm,
        "eps": config.eps,
        "num_experts": model.num_experts,
        "epochs": config.epochs,
        "train_seconds": history[-1]["seconds"] if history else 0.0,
        "weights": weights,
        "split": "held-out" if data.official_test is None else "test",
        "held_out": len(test),
        "sample": None if len(test) == len(data.test) else {"of": len(data.test), "seed": config.seed},
        "attack": {"name": "PGD", "steps": steps, "alpha_ratio": config.alpha_ratio, "restarts": restarts},
        "suite": suite,
        "torch": torch.__version__,
        **results,
        "baselines": {},
    }
    write_json(run / "report.json", report)
    save_tensors(run / "examples.safetensors", examples(model, test, data.num_classes, adversarial))
    return report


def measure(
    model: RobustClassifier,
    config: Config,
    images: Split,
    steps: int,
    restarts: int,
    suite: str = "quick",
    queries: int = QUERIES,
) -> tuple[dict[str, Any], Tensor]:
    """The figures of report.json, and the images [n, C, H, W] that PGD on the whole model found.

    sa                       accuracy on clean images
    ra                       of the whole model, under PGD with restarts on the whole model
    ra_e                     of each expert alone, under PGD on that expert
    ra_r                     of the whole model, under PGD on the router's choice; None for one expert
    aa                       under AutoAttack's standard ensemble; None in the quick suite
    aa_flags                 what AutoAttack warned of
    verdict                  part of the images that withstand every attack of the suite; worst_attack is the strongest
    attacks                  accuracy under each attack by itself
    intervals                95 % of sa, ra, aa and verdict, by Wilson, over the images
    expert_load              part of the images that each expert gets, clean and under ra's attack
    route_flip_rate          part of the images that change expert, under the router's attack and under ra's
    route_radius             of affine routers: the median distance to a change of expert, and the part of the images
                             beyond eps, whose route is certified
    certificate              of the RT-ER paper, see `paper_certificate`
    checks                   of the evaluation itself, see `sanity`
    eps_curve                [eps, accuracy] pairs; what breaks at one eps counts as broken at every larger one
    alpha_curve              of a dual model: see rter.alpha
    """
    images = Split(images.x, images.y)
    full, tally = suite == "full", Tally(model, images)

    def attacked(target: nn.Module, name: str, restarts: int = 1, y: Tensor = images.y) -> Attacked:
        return attack(target, config, Split(images.x, y), name, eps=config.eps, steps=steps, restarts=restarts)

    clean, clean_route, several = tally.robust, routed_to(model, images.x), model.num_experts > 1
    whole = attacked(model, "whole", restarts)
    tally.add("pgd", whole.x)
    alone = [attacked(expert_alone(model, e), f"expert {e}") for e in range(model.num_experts)]
    transfers = {f"pgd on expert {e}": found for e, found in enumerate(alone)}
    router = None
    if several:
        transfers["pgd on the experts' mean"] = attacked(View(model, _mean_of_experts), "average")
        router = transfers["pgd on the router"] = attacked(RouterLogits(model), "router", y=clean_route)
    for name, found in transfers.items():
        tally.add(name, found.x)
    for name, find in apgd_attacks(model, config, images, steps, full).items():
        tally.add(name, found_by(find, model, images))
    aa, flags, left = None, None, None
    if full:
        seed = config.seed_for("autoattack") % 2**31
        white, square, flags = auto_attack(model, images, config.norm, config.eps, seed, queries)
        withstand = predict(model, white) == images.y
        left = tally.robust & withstand, tally.add("square", square)
        aa = tally.add("autoattack", torch.where(withstand[:, None, None, None], square, white))
    weight = affine_router(model, images.x) if several else None
    radius = None if weight is None else route_radius(model, images.x, config.norm, weight)
    curve = eps_curve(model, config, images, steps, whole.robust)
    figures = {"sa": clean, "ra": whole.robust, "verdict": tally.robust} | ({} if aa is None else {"aa": aa})
    return {
        "sa": mean(clean),
        "ra": mean(whole.robust),
        "ra_e": [mean(found.robust) for found in alone],
        "ra_r": tally.accuracies()["pgd on the router"] if several else None,
        "aa": None if aa is None else mean(aa),
        "aa_flags": flags,
        "verdict": mean(tally.robust),
        "worst_attack": tally.worst,
        "attacks": tally.accuracies(),
        "intervals": {name: list(wilson(mean(robust), len(images))) for name, robust in figures.items()},
        "expert_load": _load(clean_route, model.num_experts),
        "expert_load_adversarial": _load(routed_to(model, whole.x), model.num_experts),
        "route_flip_rate": mean(~router.robust) if router else 0.0,
        "route_flip_rate_whole": mean(routed_to(model, whole.x) != clean_route),
        "route_radius": radius
        if radius is None
        else {"median": radius.median().item(), "certified": mean(radius > config.eps)},
        "certificate": None if weight is None else paper_certificate(model, images.x, images.y, weight),
        "checks": sanity(model, config, images, steps, whole.robust, radius, router, left, flags, full),
        "eps_curve": curve,
        **(
            {"alpha_curve": alpha_curve(model, images, lambda dual: attacked(dual, "alpha").x, predict)}
            if isinstance(model, DualClassifier)
            else {}
        ),
    }, whole.x


def sanity(
    model: RobustClassifier,
    config: Config,
    images: Split,
    steps: int,
    robust: Tensor,
    radius: Tensor | None,
    router: Attacked | None,
    left: tuple[Tensor, Tensor] | None,
    flags: list[str] | None,
    full: bool,
) -> dict[str, dict[str, Any]]:
    """Signs of an attack that is too weak, or of a gradient that is hidden, each with whether it is absent.

    Two of them are on `left`, which images withstand all attacks by gradients and which Square alone: that a black box
    breaks no more images, and that it hardly breaks others, of which AutoAttack allows 0.2 %. The verdict counts those.
    """
    few = max(1, round(0.002 * len(images)))
    checks: dict[str, tuple[bool, Any]] = {"deterministic": (is_deterministic(model, images.x[:BATCH]), None)}
    if radius is not None and router is not None:
        flipped = int((~router.robust & (radius > config.eps * (1 + 1e-4))).sum())
        checks["no certified route was flipped"] = flipped == 0, flipped
    if full:
        everything = {"Linf": 1.0, "L2": images.x[0].numel() ** 0.5, "L1": float(images.x[0].numel())}[config.norm]
        unbounded = mean(attack(model, config, images, "unbounded", eps=everything, steps=steps, restarts=3).robust)
        checks["no image withstands an unbounded attack"] = unbounded == 0, unbounded
        rest = images[robust]
        more = attack(model, config, rest, "more", eps=config.eps, steps=2 * steps) if len(rest) else None
        gain = int((~more.robust).sum()) / len(images) if more else 0.0
        checks["twice the steps gain PGD at most 1 point"] = gain <= 0.01, gain
    if left is not None:
        gradients, square = left
        more_left, others = int(square.sum() - gradients.sum()), int((gradients & ~square).sum())
        checks["gradients break at least as many images as Square"] = more_left >= 0, more_left
        checks["at most 0.2 % of the images, or one, fall to Square only"] = others <= few, others
    if flags is not None:
        checks["AutoAttack raises no flag"] = not flags, len(flags)
    return {name: {"passed": passed, "value": value} for name, (passed, value) in checks.items()}


def eps_curve(
    model: RobustClassifier, config: Config, images: Split, steps: int, robust: Tensor
) -> list[tuple[float, float]]:
    """Accuracy against eps. `robust` holds the images known to withstand the run's own eps."""
    standing = predict(model, images.x) == images.y
    curve = [(0.0, mean(standing))]
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
        curve.append((ratio * config.eps, mean(standing)))
    return curve


def expert_alone(model: RobustClassifier, expert: int) -> View:
    return View(model, lambda model, x: model(x, routing=model.route(x).fixed(expert)))


def _mean_of_experts(model: RobustClassifier, x: Tensor) -> Tensor:
    route = model.route(x)
    return torch.stack([model(x, routing=route.fixed(e)) for e in range(model.num_experts)]).mean(0)


def examples(model: RobustClassifier, test: Split, num_classes: int, adversarial: Tensor) -> dict[str, Tensor]:
    """The first test image of each class, its adversarial twin, and what the model says to both."""
    rows = torch.cat([(test.y == label).nonzero()[:1, 0] for label in range(num_classes)])
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
