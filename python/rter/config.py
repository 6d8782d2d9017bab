"""Every setting of a run, checked, with its JSON form."""

import dataclasses
import functools
import json
import math
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from rter.data import DATASETS
from rter.data.augment import make_augment
from rter.errors import UserError, did_you_mean
from rter.methods import FAITHFUL, METHODS
from rter.models import parse_normalize
from rter.models.networks import NETWORKS
from rter.models.routers import ROUTERS
from rter.optimisation import OPTIMIZERS, SCHEDULES
from rter.seeds import seed_for

GATES = ("hard", "sigmoid", "softmax", "soft", "straight_through")
NORMS = ("Linf", "L2", "L1")
MIXES = ("logits", "probabilities")
ABSOLUTE = "data_dir_absolute"  # in a run's config.json beside data_dir, which stands there as it was given
GROUPS = ("run", "model", "data", "attack", "method", "optimisation")


def _setting(default: Any, help: str, choices: tuple[str, ...] = (), group: str = "method") -> Any:
    metadata = {"default": default, "help": help, "choices": choices, "group": group}
    return dataclasses.field(default=None, metadata=metadata)


_run, _model, _data, _attack, _method, _optimisation = (functools.partial(_setting, group=group) for group in GROUPS)


@dataclass(frozen=True)
class Config:
    """Settings of a run; None stands for the method's default. Raises UserError on a value that is out of range."""

    seed: int = _run(0, "split, initialisation, shuffling and attack starts all follow from it")
    epochs: int = _run(50, "passes over the training images; 0 keeps the weights of --init as they came")
    eval_every: int = _run(5, "epochs between two measurements on the held-out images")

    data: str = _data("digits", "what to train on, see `rter data --help`", tuple(DATASETS))
    data_dir: str = _data("data", "folder of the data set's files")
    held_out: int = _data(360, "training images kept to choose the best weights by, and to test on where the data "
                          "have no test split")  # fmt: skip
    train_images: int = _data(0, "images to train on, drawn by the seed in the proportions of the classes; 0: all")
    image_size: int = _data(0, "pixels to which images in files of their own are scaled; 0: as they are")
    augment: str = _data("auto", "changes of training images: none, or some of flip,translateN,cropN,cutoutN; auto: "
                         "none for digits, translate2,cutout8 for svhn, else flip,translate2,cutout8")  # fmt: skip

    num_experts: int = _model(4, "experts; 1 is a dense network")
    model: str = _model("small-conv", "network of an expert", tuple(NETWORKS))
    width: int = _model(16, "channels of an expert's first layer, or of a token of vit")
    depth: int = _model(0, "layers of wrn or blocks of vit; the other networks have a depth of their own")
    patch: int = _model(4, "pixels of vit's patches")
    router: str = _model("linear", "network that chooses the expert", tuple(ROUTERS))
    normalize: str = _model("data", "what the model normalises images by: data, for mean and deviation of the training "
                            "images, or an --init network's own, such as 0.49,0.48,0.45/0.25,0.24,0.26")  # fmt: skip
    init: str = _model(
        "", "file of weights to begin with: a mixture of RT-ER's public code, or one network for every expert"
    )
    gate: str = _model(
        "straight_through",
        "weight of the chosen expert's logits: its softmax (as in RT-ER's paper), 1 with the softmax's gradient "
        "(straight_through), 1 without any (hard); soft mixes all experts",
        GATES,
    )
    dual_alpha: float = _model(
        0.98, "alpha, weight of the robust model in the dual one, (1 - alpha) F_S + alpha F_R; the paper's is 0.7"
    )
    dual_mix: str = _model("logits", "what the dual model mixes: logits, which nothing bounds, or probabilities", MIXES)

    norm: str = _attack("Linf", "norm of the perturbation", NORMS)
    eps: float = _attack(0.2, "radius of the perturbation, for images in [0, 1]; a number or a fraction such as 8/255")
    alpha_ratio: float = _attack(0.25, "step of the attack as a part of eps")
    attack_steps: int = _attack(10, "steps of PGD in training")

    method: str = _method("rt-er", "how to train: the formulas stand below", tuple(METHODS))
    faithful: bool = _method(False, "take the settings of RT-ER's public code: hard gate, beta 6, no part of ours")
    beta: float = _method(2.0, "beta, weight of the KL term of a method that has one")
    second: str = _method("random", "expert s that RT-ER trains beside the first: any other, or the second-ranked",
                          ("random", "ranked"))  # fmt: skip
    clean_weight: float = _method(1.0, "gamma, weight of the clean cross-entropy of RT-ER's expert s")
    balance_weight: float = _method(1.0, "lambda, weight of the router's balance loss on clean images")
    explore: float = _method(0.5, "part of the epochs in which an image goes at random to its first or second expert; "
                             "for nine-experts, in which the experts train independently")  # fmt: skip
    awp_gamma: float = _method(0.0, "AWP, adversarial weight perturbation, on top of any method: its size relative to "
                               "the weights, such as 0.005; 0: none")  # fmt: skip
    awp_warmup: int = _method(10, "epochs before AWP begins")
    fgsm_reach: float = _method(1.0, "greatest radius of the nine experts' FGSM, in eps")
    pgd_scale: float = _method(0.2, "the nine experts' PGD takes 10 to 50 steps times this")

    optimizer: str = _optimisation("adamw", "rule of the update", tuple(OPTIMIZERS))
    batch_size: int = _optimisation(119, "training images per step, over all processes together")
    lr: float = _optimisation(1.5e-2, "peak of the learning rate")
    schedule: str = _optimisation("one-cycle", "course of the learning rate over the steps", tuple(SCHEDULES))
    lr_low: float = _optimisation(0.5, "lowest learning rate of the cyclic schedule, as a part of lr")
    cycle_steps: int = _optimisation(500, "steps in which the cyclic schedule rises, and then falls")
    drops: str = _optimisation("100,105", "epochs after which the multi-step schedule divides the learning rate by 10")
    weight_decay: float = _optimisation(0.01, "weight decay")
    momentum: float = _optimisation(0.9, "momentum of sgd")
    clip_norm: float = _optimisation(0.0, "norm to which a longer gradient is cut; 0: it is not")
    ema: float = _optimisation(0.0, "EMA, a running mean of the weights, which is then evaluated and saved: its decay, "
                               "such as 0.999; 0: none")  # fmt: skip
    amp: str = _optimisation("none", "autocast in training and its attack; evaluation stays in fp32", ("none", "bf16"))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, _convert(field, self._default(field) if value is None else value))
        for name in ("held_out", "num_experts", "width", "eps", "alpha_ratio", "attack_steps"):
            self._demand(name, getattr(self, name) > 0, "above 0")
        for name in ("batch_size", "lr", "eval_every", "cycle_steps", "patch"):
            self._demand(name, getattr(self, name) > 0, "above 0")
        for name in ("seed", "epochs", "train_images", "image_size", "depth", "weight_decay", "clip_norm", "beta",
                     "clean_weight", "balance_weight", "awp_gamma", "awp_warmup"):  # fmt: skip
            self._demand(name, getattr(self, name) >= 0, "at least 0")
        for field in dataclasses.fields(self):
            if field.type is int:
                limit = 63 if field.name == "seed" else 31
                self._demand(field.name, getattr(self, field.name) < 2**limit, f"below 2^{limit}")
        self._demand("alpha_ratio", self.alpha_ratio <= 2, "at most 2: it is a part of eps, and 2 eps crosses the ball")
        self._demand("eps", self.eps <= 1 or self.norm != "Linf", "at most 1 in the Linf norm, images being in [0, 1]")
        for name in ("explore", "dual_alpha", "lr_low"):
            self._demand(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name in ("momentum", "ema"):
            self._demand(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        if self.schedule == "multi-step" and self.epochs:
            epochs = self.drops.split(",")
            valid = all(epoch.strip().isdecimal() and 0 < int(epoch) < self.epochs for epoch in epochs)
            self._demand("drops", valid, f"numbers below epochs, {self.epochs}, with commas between")
        for name in ("fgsm_reach", "pgd_scale"):
            self._demand(name, getattr(self, name) > 0, "above 0")
        if METHODS[self.method].second_expert:
            dense = ": one dense network is --method pgd-at --num-experts 1"
            self._demand("num_experts", self.num_experts > 1, f"at least 2 for {self.method}", dense)
            self._demand("gate", self.gate != "soft", f"one that chooses an expert for {self.method}")
        elif self.faithful:
            raise UserError(f"faithful must be given with rt-er, dual or jtdmoe, got {self.method}")
        if self.method == "nine-experts":
            self._demand("num_experts", self.num_experts == 9, "9 for nine-experts")
            self._demand("gate", self.gate == "soft", "soft for nine-experts")
        make_augment(self)
        if self.normalize != "data":
            parse_normalize(self.normalize)

    def _demand(self, name: str, holds: bool, expected: str, hint: str = "") -> None:
        if not holds:
            raise UserError(f"{name} must be {expected}, got {getattr(self, name)}{hint}")

    def _default(self, field: "dataclasses.Field[Any]") -> Any:
        own = {**METHODS[self.method].defaults} if self.method in METHODS else {}
        own |= FAITHFUL if self.faithful else {}
        own |= NETWORKS[self.model].defaults if self.model in NETWORKS else {}
        return own.get(field.name, field.metadata["default"])

    @property
    def dual(self) -> bool:
        return METHODS[self.method].dual

    def seed_for(self, *purpose: str | int) -> int:
        """A seed of its own for each purpose, such as ("attack", step), so that no draw depends on earlier ones."""
        return seed_for(self.seed, *purpose)

    def elsewhere(self, data_dir: str) -> "Config":
        """The same run on a machine, or from a folder, from which the data set's files are in `data_dir`."""
        return dataclasses.replace(self, data_dir=data_dir)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def _convert(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """The value in the field's type; text is parsed, as it comes from the command line."""
    expected = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}[field.type]  # type: ignore[index]
    try:
        if isinstance(value, field.type) and field.type in (str, bool):  # type: ignore[arg-type]
            converted: Any = value
        elif field.type is int and not isinstance(value, (bool, float)):
            converted = int(value)
        elif field.type is float and not isinstance(value, bool):
            converted = float(Fraction(value)) if isinstance(value, str) and "/" in value else float(value)
            if not math.isfinite(converted):
                raise ValueError
        else:
            raise ValueError
    except (TypeError, ValueError, ZeroDivisionError):
        raise UserError(f"{field.name} must be {expected}, got {value!r}") from None
    choices = field.metadata["choices"]
    if choices and converted not in choices:
        meant = did_you_mean(converted, choices)
        raise UserError(f"{field.name} must be one of {', '.join(choices)}, got {converted!r}{meant}")
    return converted


def load_settings(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, or in a JSON file such as another run's config.json.

    A run's data are where they were when it was made or, if they are there no more, at its `data_dir` from here.
    """
    kind, parse = ("TOML", tomllib.loads) if path.suffix.lower() == ".toml" else ("JSON", json.loads)
    try:
        settings = parse(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} must be a {kind} file: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold one JSON object, got {type(settings).__name__}")
    if (place := settings.pop(ABSOLUTE, None)) and Path(str(place)).is_dir():
        settings["data_dir"] = place
    known = {field.name for field in dataclasses.fields(Config)}
    for name in settings:
        if name not in known:
            meant = did_you_mean(name, known)
            raise UserError(f"{path}: unknown setting {name!r}; known are {', '.join(sorted(known))}{meant}")
    return settings


def load_config(path: Path) -> Config:
    return Config(**load_settings(path))
