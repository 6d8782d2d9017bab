"""A model from a function in the user's file: `rter evaluate --model FILE.py:FUNCTION [--weights FILE]`."""

import argparse
import importlib.util
import inspect
import shlex
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rter.api import evaluate_model
from rter.checkpoint import load_tensors, refusal
from rter.data.load import load_source
from rter.distributed import choose_device
from rter.errors import UserError, did_you_mean
from rter.strength import BATCH, Effort

NESTED = ("state_dict", "model_state_dict", "model")  # keys under which training code keeps the weights


def evaluate_file(args: argparse.Namespace, effort: Effort) -> Path:
    """Evaluates the model of --model and prints its report; returns the folder of the report."""
    seed = int(args.seed or 0)
    model = load_model(args.model, None if args.weights is None else Path(args.weights))
    source = load_source(args.data, Path(args.data_dir or "data"), int(args.image_size or 0))
    images = source.train if source.test is None else source.test
    chosen = images if args.images is None else images.sample(args.images, seed)
    about: dict[str, Any] = {
        "method": f"{type(model).__name__} of {args.model}",
        "data": args.data,
        "classes": list(source.names),
        "weights": args.weights,
        "split": "test" if source.test is not None else "given",
        "sample": None if len(chosen) == len(images) else {"of": len(images), "seed": seed},
    }
    given = {"weights": args.weights, "data-dir": args.data_dir, "image-size": args.image_size, "images": args.images,
             "batch-size": args.batch_size, "norm": args.norm, "seed": args.seed, "eps": args.eps,
             **asdict(effort)}  # fmt: skip
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    command = ["rter", "evaluate", "--model", args.model, "--data", args.data, *words, "--out", "NEW"]
    about["command"] = shlex.join(command)
    report = evaluate_model(
        model.to(choose_device(args.device)),
        chosen.x,
        chosen.y,
        eps=args.eps,
        norm=args.norm or "Linf",
        batch_size=int(args.batch_size or BATCH),
        seed=seed,
        out=args.out,
        about=about,
        **asdict(effort),
    )
    print(report)
    folder: Path = args.out
    return folder


def load_model(spec: str, weights: Path | None = None) -> nn.Module:
    """The module that the function returns, with the weights loaded.

    Args:
        spec: FILE.py:FUNCTION; the function takes no arguments and returns a module.
        weights: a safetensors file, or a state dict written by torch.save, which is read with weights_only.

    Raises:
        UserError: if there is no such function, if it fails, or if the weights do not fit.
    """
    file, colon, name = spec.rpartition(":")
    path = Path(file)
    if not colon or not name.isidentifier() or path.suffix != ".py":
        raise UserError(f"--model must be FILE.py:FUNCTION, got {spec!r}")
    if not path.is_file():
        raise UserError(f"--model {path} does not exist")
    function = _function(path, name)
    try:
        model = function()
    except Exception as error:
        raise UserError(f"--model {spec} raised {_where(error, path)}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"--model {spec} must return a torch.nn.Module, got {type(model).__name__}")
    if weights is not None:
        _load_weights(model, weights)
    return model


def _function(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent.resolve()))  # for the files beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--model {path} raised {_where(error, path)}") from error
    finally:
        if before is not None:
            sys.modules[path.stem] = before
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and value.__module__ == path.stem]
        raise UserError(
            f"--model {path} has no function {name}; it has {', '.join(known) or 'none'}{did_you_mean(name, known)}"
        )
    needed = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise UserError(f"--model {path}:{name} must be a function without arguments, but needs {', '.join(needed)}")
    return function


def _where(error: Exception, path: Path) -> str:
    """The error in one line, with the last line number of the file in its traceback."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} (line {error.lineno})"
    said = " ".join(str(error).split())
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == path.name]
    return f"{type(error).__name__}: {said}" + (f" (line {lines[-1]})" if lines else "")


def _load_weights(model: nn.Module, path: Path) -> None:
    given = load_tensors(path) if path.suffix.lower() == ".safetensors" else _state_dict(path)
    own = model.state_dict()
    if given and all(name.startswith("module.") for name in given):  # saved through DistributedDataParallel
        given = {name.removeprefix("module."): value for name, value in given.items()}
    problems = []
    for names, what in ((own.keys() - given.keys(), "missing"), (given.keys() - own.keys(), "not in the model")):
        if names:
            problems.append(f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})")
    for name in own.keys() & given.keys():
        if own[name].shape != given[name].shape:
            problems.append(f"{name} is {list(given[name].shape)} where the model's is {list(own[name].shape)}")
    if problems:
        raise UserError(f"--weights {path} does not fit the model: {'; '.join(problems[:4])}")
    model.load_state_dict(given)


def _state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"--weights {path} does not exist")
    try:
        given = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # from the unpickler, from zip files, and from weights_only
        raise UserError(f"--weights {path} must be a state dict of tensors alone: {refusal(error)}") from None
    for key in NESTED:
        if isinstance(given, dict) and isinstance(given.get(key), dict):
            given = given[key]
    if not isinstance(given, dict) or not all(isinstance(value, Tensor) for value in given.values()):
        raise UserError(f"--weights {path} must hold a state dict of tensors, got {type(given).__name__}")
    return given
