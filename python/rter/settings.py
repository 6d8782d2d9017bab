"""Which settings a run may have: choices, defaults of each method, network and data set, and valid combinations."""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from rter.config import Config
from rter.data import DATASETS, DEFAULTS
from rter.errors import UserError, did_you_mean
from rter.methods import FAITHFUL, METHODS
from rter.models import NETWORKS, ROUTERS
from rter.notation import parse_augment, parse_normalize
from rter.schedules import OPTIMIZERS, SCHEDULES
from rter.strength import NORMS
from rter.train_attacks import TRAIN_ATTACKS

CHOICES: Mapping[str, tuple[str, ...]] = {
    "data": tuple(DATASETS),
    "model": tuple(NETWORKS),
    "recompute": ("auto", "none", "activations", "all"),
    "router": tuple(ROUTERS),
    "gate": ("hard", "sigmoid", "softmax", "soft", "straight_through"),
    "dual_mix": ("logits", "probabilities"),
    "norm": NORMS,
    "train_attack": TRAIN_ATTACKS,
    "method": tuple(METHODS),
    "second": ("random", "ranked"),
    "optimizer": tuple(OPTIMIZERS),
    "schedule": tuple(SCHEDULES),
    "amp": ("none", "bf16"),
}
OWN_DEFAULTS: Mapping[str, Mapping[str, Any]] = {  # of each method, network and data set
    **{name: owner.defaults for owners in (METHODS, NETWORKS) for name, owner in owners.items()},
    **DEFAULTS,
}
RESUME = "resume.safetensors"  # what a run's next step depends on, which `rter.resume.State` saves
ABSOLUTE = "data_dir_absolute"  # in a run's config.json, next to data_dir as it was given


def make_config(**given: Any) -> Config:
    """The settings of a run: those given, with text parsed, and defaults for those that are missing or None.

    Raises:
        UserError: if a value is out of range or does not go with the others.
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}
    chosen = {name: _convert(fields[name], given[name]) for name in fields if given.get(name) is not None}
    values = _defaults(chosen) | chosen
    converted = {name: _convert(field, values[name]) for name, field in fields.items()}
    config = Config(**(given | converted))
    _check(config)
    return config


def _defaults(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The default of every setting. In order of precedence: that of shared stages, the network's own, that of RT-ER's
    public code (with `faithful`), the data set's, the method's, the general one."""
    defaults = {field.name: field.metadata["default"] for field in dataclasses.fields(Config)}

    def own(name: str) -> Mapping[str, Any]:
        return OWN_DEFAULTS.get(str(chosen.get(name, defaults[name])), {})

    faithful = FAITHFUL if chosen.get("faithful") else {}
    shared = {"router": "pooled"} if chosen.get("shared_stages") else {}
    return {**defaults, **own("method"), **own("data"), **faithful, **own("model"), **shared}


def _check(config: Config) -> None:
    def demand(name: str, holds: bool, expected: str, hint: str = "") -> None:
        if not holds:
            raise UserError(f"{name} must be {expected}, got {getattr(config, name)}{hint}")

    for name in ("held_out", "num_experts", "width", "eps", "alpha_ratio", "attack_steps"):
        demand(name, getattr(config, name) > 0, "above 0")
    for name in ("batch_size", "lr", "eval_every", "cycle_steps", "patch", "kernels"):
        demand(name, getattr(config, name) > 0, "above 0")
    for name in ("seed", "epochs", "train_images", "image_size", "depth", "weight_decay", "clip_norm", "beta",
                 "clean_weight", "balance_weight", "route_weight", "awp_gamma", "awp_warmup",
                 "shared_stages"):  # fmt: skip
        demand(name, getattr(config, name) >= 0, "at least 0")
    for field in dataclasses.fields(config):
        if field.type is int:
            limit = 63 if field.name == "seed" else 31
            demand(field.name, getattr(config, field.name) < 2**limit, f"below 2^{limit}")
    demand("alpha_ratio", config.alpha_ratio <= 2, "at most 2: it is relative to eps, and 2 eps spans the ball")
    demand("eps", config.eps <= 1 or config.norm != "Linf", "at most 1 in the Linf norm, images being in [0, 1]")
    for name in ("explore", "upcycle", "dual_alpha", "lr_low", "collapse"):
        demand(name, 0 <= getattr(config, name) <= 1, "between 0 and 1")
    for name in ("momentum", "ema", "label_smoothing"):
        demand(name, 0 <= getattr(config, name) < 1, "at least 0 and below 1")
    if config.schedule == "multi-step" and config.epochs:
        epochs = config.drops.split(",")
        valid = all(epoch.strip().isdecimal() and 0 < int(epoch) < config.epochs for epoch in epochs)
        demand("drops", valid, f"numbers below epochs, {config.epochs}, with commas between")
    for name in ("fgsm_reach", "pgd_scale"):
        demand(name, getattr(config, name) > 0, "above 0")
    attack, method = config.train_attack, METHODS[config.method]
    demand("train_attack", attack in method.attacks, f"{' or '.join(method.attacks)} for {config.method}")
    if attack in ("n-fgsm", "fgsm-pgi"):
        demand("norm", config.norm == "Linf", f"Linf with train_attack {attack}")
    demand(
        "eps", attack != "n-fgsm" or 3 * config.eps <= 1, "at most 1/3 with train_attack n-fgsm, which moves by 3 eps"
    )
    if config.shared_stages:
        demand("shared_stages", config.model == "resnet18" and config.shared_stages <= 4, "at most 4, of resnet18")
        demand("shared_stages", config.method != "advmoe", "0 for advmoe, which trains experts and router alone")
        demand("shared_stages", not config.init, "0 with init, whose experts share nothing")
    demand("kernels", config.kernels == 1 or config.model == "resnet18", f"1 for {config.model}")
    demand("kernels", config.kernels == 1 or not config.init, "1 with init, whose convolutions have one kernel")
    if config.upcycle:
        demand("upcycle", config.method not in ("jtdmoe", "nine-experts"), f"0 for {config.method}")
        demand("gate", config.gate != "soft", "one that chooses an expert with upcycle above 0")
    if config.route_weight:
        demand("route_weight", len(method.attacks) > 1, f"0 for {config.method}")
        demand("gate", config.gate != "soft", "one that chooses an expert with route_weight above 0")
    if method.second_expert:
        dense = ": one dense network is --method pgd-at --num-experts 1"
        demand("num_experts", config.num_experts > 1, f"at least 2 for {config.method}", dense)
        demand("gate", config.gate != "soft", f"one that chooses an expert for {config.method}")
    elif config.faithful:
        raise UserError(f"faithful must be given with rt-er, dual or jtdmoe, got {config.method}")
    if config.method == "nine-experts":
        demand("num_experts", config.num_experts == 9, "9 for nine-experts")
        demand("gate", config.gate == "soft", "soft for nine-experts")
    parse_augment(config.augment, config.data)
    if config.normalize != "data":
        parse_normalize(config.normalize)


def _convert(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """The value, converted to the field's type; text, as from the command line, is parsed."""
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
    choices = CHOICES.get(field.name)
    if choices and converted not in choices:
        meant = did_you_mean(converted, choices)
        raise UserError(f"{field.name} must be one of {', '.join(choices)}, got {converted!r}{meant}")
    return converted


def load_settings(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, or in a JSON file such as another run's config.json.

    A run's data are looked for where they were when it was made and, if they are gone, in its `data_dir` from here.
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
    return make_config(**load_settings(path))
