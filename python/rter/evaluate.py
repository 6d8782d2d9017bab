"""How accurate and how robust a model is: the figures of an evaluation, and those of a run of `rter train`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import RouterLogits
from moe_kernels.attacks import every_expert
from rter.attack import make_attack
from rter.autoattack import auto_attack
from rter.certificate import affine_router, paper_certificate, route_radius
from rter.checkpoint import demand_no_run, floating_dtype, load_weights, read_lines, run_config, write_atomic
from rter.config import Config
from rter.curves import eps_curve, mixing_curve
from rter.data.load import load_data
from rter.data.split import Data, Split
from rter.distributed import choose_device
from rter.evaluation import Attacked, Evaluation, mean, predict, says
from rter.intervals import wilson
from rter.journal import seeded
from rter.measured import Report, made_with
from rter.models.build import build_model
from rter.models.classifier import RobustClassifier, View
from rter.sanity import Seen, sanity
from rter.strength import Effort, Strength
from rter.suite import apgd_attacks

JOURNAL = "evaluation.jsonl"


def strength_of(config: Config, **options: Any) -> Strength:
    """The strength of a run's evaluation, with the options of an `Effort`."""
    return Strength(eps=config.eps, norm=config.norm, alpha_ratio=config.alpha_ratio, seed=config.seed, **options)


def quick_accuracies(model: RobustClassifier, config: Config, images: Split) -> dict[str, float]:
    """Clean accuracy, and accuracy under PGD of the training attack's strength."""
    model.eval()
    evaluation = Evaluation(model, images, strength_of(config, steps=config.attack_steps))
    found = evaluation.pgd(model, "quick", among=evaluation.clean)
    return {"sa": mean(evaluation.clean), "ra": mean(found.robust)}


@dataclass(frozen=True)
class TrainedRun:
    """A run of `rter train` that is to be evaluated.

    Args:
        folder: of the run.
        weights: "last" or "best".
        images: how many of the test images, drawn by the run's seed in the proportions of the classes; None for all.
        data_dir: folder of the data set's files, if they have moved since training.
        device: "cpu", "cuda" or "cuda:N"; None for a GPU, if there is one.
        out: folder for the report; None for the run's.
    """

    folder: Path
    weights: str = "last"
    images: int | None = None
    data_dir: str | None = None
    device: str | None = None
    out: Path | None = None

    @property
    def file(self) -> Path:
        """Of the weights."""
        return self.folder / f"{self.weights}.safetensors"

    def load(self) -> tuple[Config, Data, RobustClassifier]:
        """Its settings, its data and its trained model, in eval mode."""
        config = run_config(self.folder, self.data_dir)
        where = choose_device(self.device)
        data = load_data(
            config.data, config.held_out, config.seed, config.data_dir, config.image_size, config.train_images
        ).to(where)
        model = build_model(config, data).to(where)
        load_weights(self.file, model)
        return config, data, model.eval()


def evaluate(run: TrainedRun, effort: Effort, progress: bool = False) -> dict[str, Any]:
    """Attacks the weights of a run; writes report.json and examples.safetensors into its folder, or another.

    An evaluation that was killed is resumed, and a finished one is not computed again.
    """
    out = run.out or run.folder
    own = out.resolve() == run.folder.resolve()
    if not own:
        demand_no_run(out)
    config, data, model = run.load()
    test = data.test if run.images is None else data.test.sample(run.images, config.seed)
    history = read_lines(run.folder / "metrics.jsonl")
    evaluation = Evaluation(model, test, strength_of(config, **asdict(effort)), out / JOURNAL, progress)
    if before := Report.finished(out, evaluation, replace=own):
        return before.figures
    about = {
        "method": config.method,
        "data": config.data,
        "seed": config.seed,
        "norm": config.norm,
        "eps": config.eps,
        "num_experts": model.num_experts,
        "routes": "attacked" if model.num_experts > 1 else "none: the model has one expert",
        "epochs": config.epochs,
        "train_seconds": history[-1]["seconds"] if history else 0.0,
        "collapsed": next((record["epoch"] for record in history if record.get("collapsed")), None),
        "weights": run.weights,
        "weights_dtype": floating_dtype(run.file),
        "run": None if run.out is None else str(run.folder),
        "split": "held-out" if data.official_test is None else "test",
        "classes": list(data.names),
        "held_out": len(test),
        "sample": None if len(test) == len(data.test) else {"of": len(data.test), "seed": config.seed},
    }
    report = Report(about | measure(evaluation), examples(evaluation), evaluation.outcomes)
    report.save(out)
    if run.out:
        write_atomic(out / "metrics.jsonl", (run.folder / "metrics.jsonl").read_bytes())
    evaluation.journal.finish()
    return report.figures


def measure(evaluation: Evaluation) -> dict[str, Any]:
    """The figures of report.json.

    sa                       accuracy on clean images
    ra                       of the whole model, under PGD with restarts on the whole model
    ra_e                     of each expert alone, under PGD on that expert; empty in the suite "pgd"
    ra_r                     of the whole model, under PGD on the router's choice; None without a route
    aa                       under AutoAttack's standard ensemble; None except in the full suite
    aa_flags                 AutoAttack's warnings
    verdict                  fraction of the images that withstand every attack of the suite
    attacks                  fraction of the images that each attack leaves standing: for attacks with a figure of
                             their own, such as pgd and autoattack, among those classified correctly; for others,
                             among those that stood before them
    attack_results           for each attack: how many images it was tried on, how many it broke, how many of these
                             no earlier attack had broken, and seconds
    worst_attack             the attack that broke most of what pgd left standing
    intervals                95 % intervals of sa, ra, aa and verdict over the images, by Wilson
    expert_load              fraction of the images that each expert gets, clean and under ra's attack
    route_flip_rate          fraction of the images that change expert, under the router's attack and under ra's
    route_radius             for affine routers: the median distance to a change of expert, and the fraction of the
                             images for which it exceeds eps, so that their route is certified
    certificate              that of the RT-ER paper, see `paper_certificate`
    images                   hash of the images; reports with the same hash are paired image by image, see rter.paired
    checks                   checks of the evaluation itself, see `sanity`
    identity                 what identifies the same evaluation, see `Evaluation`
    eps_curve                [eps, accuracy] pairs; an image broken at one eps counts as broken at every larger one
    alpha_curve              for a dual model, see rter.alpha
    """
    model, strength, x, clean = evaluation.model, evaluation.strength, evaluation.x, evaluation.clean
    whole = evaluation.pgd(
        model, "pgd", restarts=strength.whole_restarts, among=clean, judge=lambda x_adv, part: _route(evaluation, x_adv)
    )
    evaluation.record("pgd", clean, whole.robust)
    parts = _Parts([]) if strength.suite == "pgd" else _parts(evaluation)
    for name, find in apgd_attacks(evaluation).items():
        evaluation.find(name, find)
    by_gradients, flags, aa, square = evaluation.standing.clone(), None, None, None
    if strength.full:
        aa, white, square, flags = auto_attack(evaluation)
        by_gradients &= white
    figures = {"sa": clean, "ra": whole.robust, "verdict": evaluation.standing} | ({} if aa is None else {"aa": aa})
    evaluation.outcomes = figures
    routes = _routes(evaluation, whole, parts.route)
    seen = Seen(
        whole.robust,
        None if parts.route is None else parts.route.robust,
        routes.pop("certified"),
        None if square is None else by_gradients,
        square,
        flags,
    )
    return {
        "attack": {
            "name": "PGD",
            "steps": strength.steps,
            "alpha_ratio": strength.alpha_ratio,
            "restarts": strength.whole_restarts,
        },
        "suite": strength.suite,
        "images": evaluation.images_hash(),
        "batch_size": strength.batch_size,
        "queries": strength.queries if strength.full else None,
        "torch": torch.__version__,
        "made_with": made_with(x.device),
        "sa": mean(clean),
        "ra": mean(whole.robust),
        "ra_e": [mean(found.robust) for found in parts.alone],
        "ra_r": parts.ra_r,
        "aa": None if aa is None else mean(aa),
        "aa_flags": flags,
        "verdict": mean(evaluation.standing),
        "worst_attack": _worst(evaluation),
        "attacks": {result.name: result.accuracy for result in evaluation.results},
        "attack_results": [asdict(result) for result in evaluation.results],
        "intervals": {name: list(wilson(mean(robust), len(x))) for name, robust in figures.items()},
        **routes,
        "checks": sanity(evaluation, seen),
        "eps_curve": eps_curve(evaluation, whole.robust),
        **mixing_curve(evaluation),
        "identity": evaluation.identity,
        "baselines": {},
    }


@dataclass(frozen=True)
class _Parts:
    """PGD on each expert, and on the router."""

    alone: list[Attacked]
    route: Attacked | None = None
    ra_r: float | None = None


def _parts(evaluation: Evaluation) -> _Parts:
    """Attacks the parts of a mixture, and tries what is found on the whole model."""
    model, y, clean = evaluation.model, evaluation.y, evaluation.clean

    def attacked(target: nn.Module, name: str, labels: Tensor = y, among: Tensor | None = None) -> Attacked:
        found = evaluation.pgd(
            target, name, y=labels, among=among, judge=lambda x_adv, part: {"right": says(model, x_adv, y[part])}
        )
        right = found.judged.get("right", clean)
        evaluation.record(f"pgd on {name}", found.tried, right, among=among, parts=f"{name}/")
        return found

    alone = [attacked(expert_alone(model, e), f"expert {e}") for e in range(evaluation.num_experts)]
    if not evaluation.several:
        return _Parts(alone)
    attacked(View(model, _mean_of_experts), "the experts' mean", among=evaluation.standing)
    chosen = evaluation.of_each("route", evaluation.everything, lambda part: _route(evaluation, evaluation.x[part]))
    route = attacked(RouterLogits(model), "the router", chosen["expert"])
    return _Parts(alone, route, mean(clean & route.judged.get("right", clean)))


def _routes(evaluation: Evaluation, whole: Attacked, route: Attacked | None) -> dict[str, Any]:
    """What happens to the route, and what is proved about it; zeros and None for a model without experts."""
    model, x, clean = evaluation.model, evaluation.x, evaluation.clean
    loads: dict[str, Any] = {"expert_load": [], "expert_load_adversarial": [], "route_flip_rate_whole": 0.0}
    if evaluation.num_experts:
        own = evaluation.of_each("route", evaluation.everything, lambda part: _route(evaluation, x[part]))["expert"]
        adversarial = torch.where(clean, whole.judged.get("expert", own), own)
        loads = {
            "expert_load": _load(own, evaluation.num_experts),
            "expert_load_adversarial": _load(adversarial, evaluation.num_experts),
            "route_flip_rate_whole": int((adversarial != own).sum()) / max(int(clean.sum()), 1),
        }
    eps, norm, batch = evaluation.strength.eps, evaluation.strength.norm, evaluation.strength.batch_size
    with seeded(evaluation.strength.seed_for("affine"), x.device):
        weight = affine_router(model, x[:batch]) if evaluation.several else None
    radius = None if weight is None else torch.cat([route_radius(model, p, norm, weight) for p in x.split(batch)])
    return loads | {
        "route_flip_rate": 0.0 if route is None else mean(~route.robust),
        "route_radius": None if radius is None else {"median": radius.median().item(), "certified": mean(radius > eps)},
        "certificate": None if weight is None else paper_certificate(model, x, evaluation.y, weight),
        "certified": None if radius is None else radius > eps * (1 + 1e-4),
    }


def _worst(evaluation: Evaluation) -> str:
    """The attack that broke most of what PGD left, or PGD if none broke any more."""
    first, *others = (result for result in evaluation.results if result.name != "autoattack")
    worst = max(others, key=lambda result: result.new, default=first)
    return worst.name if worst.new else first.name


def expert_alone(model: Any, expert: int) -> View:
    return View(model, lambda model, x: model(x, routing=model.route(x).fixed(expert)))


def _mean_of_experts(model: Any, x: Tensor) -> Tensor:
    return every_expert(model, x).mean(0)


def examples(evaluation: Evaluation) -> dict[str, Tensor]:
    """The first image of each class, its adversarial version, and the model's predictions for both."""
    model, strength, y = evaluation.model, evaluation.strength, evaluation.y
    rows = torch.cat([(y == label).nonzero()[:1, 0] for label in y.unique()])

    def compute(part: Tensor) -> dict[str, Tensor]:
        attack = make_attack(
            model, strength, strength.eps, strength.steps, "examples", int(part[0]), restarts=strength.whole_restarts
        )
        x, label = evaluation.x[part], y[part]
        x_adv = attack(x, label)
        said = {"clean": predict(model, x), "adversarial": predict(model, x_adv)}
        return {"x": x, "x_adv": x_adv, "label": label, **said}

    batches = [found for _, found in evaluation.batches("examples", rows, compute)]
    return {name: torch.cat([found[name] for found in batches]) for name in batches[0]}


@torch.no_grad()
def _route(evaluation: Evaluation, x: Tensor) -> dict[str, Tensor]:
    """The expert of each image [n] int64; nothing for a model without experts."""
    model: Any = evaluation.model
    return {"expert": model.route(x).experts[:, 0].long()} if evaluation.num_experts else {}


def _load(experts: Tensor, num_experts: int) -> list[float]:
    return (torch.bincount(experts, minlength=num_experts) / len(experts)).tolist()
