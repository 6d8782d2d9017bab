"""Every setting of a run, checked, with its JSON form."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from rter.data import DATASETS
from rter.data.augment import make_augment
from rter.errors import UserError
from rter.methods import FAITHFUL, METHODS
from rter.models import parse_normalize
from rter.models.networks import NETWORKS
from rter.models.routers import ROUTERS

GATES = ("hard", "sigmoid", "softmax", "soft", "straight_through")
NORMS = ("Linf", "L2", "L1")


def _setting(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(default=None, metadata={"default": default, "help": help, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Settings of a run; None stands for the method's default. Raises UserError on a value that is out of range."""

    method: str = _setting("rt-er", "what to train", tuple(METHODS))
    faithful: bool = _setting(False, "take the settings of RT-ER's public code: a hard gate, no clean or balance term")
    data: str = _setting("digits", "what to train on", tuple(DATASETS))
    seed: int = _setting(0, "split, initialisation, shuffling and attack starts all follow from it")
    held_out: int = _setting(360, "training images kept to choose the best weights by, and to test on where the data "
                             "have no test split")  # fmt: skip
    data_dir: str = _setting("data", "folder of the data set's files")
    image_size: int = _setting(0, "pixels to which images in files of their own are scaled; 0: as they are")
    augment: str = _setting("auto", "changes of training images, such as flip,translate2,cutout8 or crop4; none; auto: "
                            "none for digits, no flip for svhn, the former otherwise")  # fmt: skip

    num_experts: int = _setting(4, "experts; 1 is a dense network")
    model: str = _setting("small-conv", "network of an expert", tuple(NETWORKS))
    width: int = _setting(16, "channels of an expert's first layer or of a token; resnets 64, wrn 160, vit 384")
    depth: int = _setting(0, "layers of wrn (28) or blocks of vit (12)")
    patch: int = _setting(4, "pixels of vit's patches")
    router: str = _setting("linear", "network that chooses the expert", tuple(ROUTERS))
    normalize: str = _setting("data", "means/deviations of the channels, such as 0.49,0.48,0.45/0.25,0.24,0.26, for a "
                              "network of other code; data: the training images'")  # fmt: skip
    init: str = _setting("", "file of weights to begin with: RT-ER's public code, or one network for all experts")
    gate: str = _setting("straight_through", "weight of the chosen expert; soft mixes all experts", GATES)
    dual_alpha: float = _setting(
        0.98, "weight of the robust model in the dual one, (1 - alpha) F_S + alpha F_R; the paper's is 0.7"
    )

    norm: str = _setting("Linf", "norm of the perturbation", NORMS)
    eps: float = _setting(0.2, "radius of the perturbation, for images in [0, 1]; a number or a fraction such as 8/255")
    alpha_ratio: float = _setting(0.25, "step of the attack as a part of eps")
    attack_steps: int = _setting(10, "steps of the attack in training")

    epochs: int = _setting(50, "passes over the training images")
    batch_size: int = _setting(119, "training images per step")
    lr: float = _setting(1.5e-2, "peak of the one-cycle learning rate")
    weight_decay: float = _setting(0.01, "AdamW's")
    eval_every: int = _setting(5, "epochs between two measurements on the held-out images")

    beta: float = _setting(2.0, "weight of the KL term")
    clean_weight: float = _setting(1.0, "weight of the clean cross-entropy of RT-ER's second expert")
    balance_weight: float = _setting(1.0, "weight of the router's balance loss on clean images")
    explore: float = _setting(0.5, "part of the epochs in which an image goes at random to its first or second expert; "
                              "for nine-experts, in which the experts train independently")  # fmt: skip
    awp_gamma: float = _setting(0.0, "relative size of AWP's perturbation of the weights, such as 0.005; 0 for none")
    awp_warmup: int = _setting(10, "epochs before AWP begins")
    fgsm_reach: float = _setting(1.0, "greatest radius of the nine experts' FGSM, in eps")
    pgd_scale: float = _setting(0.2, "the nine experts' PGD takes 10 to 50 steps times this")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, _convert(field, self._default(field) if value is None else value))
        for name in ("held_out", "num_experts", "width", "eps", "alpha_ratio", "attack_steps"):
            self._demand(name, getattr(self, name) > 0, "above 0")
        for name in ("epochs", "batch_size", "lr", "eval_every", "patch"):
            self._demand(name, getattr(self, name) > 0, "above 0")
        for name in ("seed", "image_size", "depth", "weight_decay", "beta", "clean_weight", "balance_weight",
                     "awp_gamma", "awp_warmup"):  # fmt: skip
            self._demand(name, getattr(self, name) >= 0, "at least 0")
        self._demand("eps", self.eps <= 1 or self.norm != "Linf", "at most 1 in the Linf norm, images being in [0, 1]")
        for name in ("explore", "dual_alpha"):
            self._demand(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name in ("fgsm_reach", "pgd_scale"):
            self._demand(name, getattr(self, name) > 0, "above 0")
        if METHODS[self.method].second_expert:
            self._demand("num_experts", self.num_experts > 1, f"at least 2 for {self.method}")
            self._demand("gate", self.gate != "soft", f"one that chooses an expert for {self.method}")
        elif self.faithful:
            raise UserError(f"faithful must be given with rt-er, dual or jtdmoe, got {self.method}")
        if self.method == "nine-experts":
            self._demand("num_experts", self.num_experts == 9, "9 for nine-experts")
            self._demand("gate", self.gate == "soft", "soft for nine-experts")
        make_augment(self)
        if self.normalize != "data":
            parse_normalize(self.normalize)

    def _demand(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(f"{name} must be {expected}, got {getattr(self, name)}")

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
        digest = hashlib.sha256(repr((self.seed, *purpose)).encode()).digest()
        return int.from_bytes(digest[:7], "little")

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
        raise UserError(f"{field.name} must be one of {', '.join(choices)}, got {converted!r}")
    return converted


def load_settings(path: Path) -> dict[str, Any]:
    """The settings in a JSON file, such as another run's config.json."""
    try:
        settings = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} must be a JSON file: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold one JSON object, got {type(settings).__name__}")
    known = {field.name for field in dataclasses.fields(Config)}
    for name in settings:
        if name not in known:
            raise UserError(f"{path}: unknown setting {name!r}; known are {', '.join(sorted(known))}")
    return settings


def load_config(path: Path) -> Config:
    return Config(**load_settings(path))
