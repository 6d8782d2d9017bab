"""The arguments of every command. Help and error messages need no import of torch, which takes seconds."""

import argparse
import dataclasses
import platform
import re
from pathlib import Path
from typing import Any, NoReturn

from rter.config import GROUPS, Config
from rter.data.command import add_command as add_data_command
from rter.errors import UserError, did_you_mean
from rter.methods import METHODS
from rter.model_arguments import EVALUATE, add_model_arguments
from rter.settings import CHOICES, OWN_DEFAULTS
from rter.strength import RESTARTS

TRAIN = """Trains a model into a new folder. A setting comes from its flag, else from the file given by --config, else
from its default. On several GPUs, or in several processes: torchrun --nproc-per-node N -m rter train ..."""

NOTHING: dict[Any, str] = {bool: "no", str: "none", int: "0", float: "0"}
METAVARS: dict[Any, str] = {str: "TEXT", int: "N", float: "NUMBER"}

SYMBOLS = """
F is the model, f_e expert e alone, s the expert of --second, r the router; x1, x2 and x_e are x under attack, by PGD
unless stated otherwise. CE is the cross-entropy, KL the divergence of the softmaxes, balance(x) the Switch loss that
keeps all experts in use. beta, gamma, lambda and alpha are --beta, --clean-weight, --balance-weight and --dual-alpha.

With several experts, standard, pgd-at and trades are the baselines standard MoE, AT-MoE and TRADES-MoE; with
--num-experts 1 they train one dense network. AWP, EMA, bf16 and the schedules work with every method.
docs/methods.md has the details."""


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line on stderr, with a suggestion of what may have been meant.

    Flags cannot be abbreviated: --alpha would otherwise be taken for --alpha-ratio, which is relative to eps.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        meant = did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2])) if choice else ""
        raise UserError(f"{message}{meant} (see `{self.prog} --help`)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuses unknown arguments here, where the command, and so the flags to suggest, are known."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            meant = did_you_mean(flag, self._option_string_actions) if flag.startswith("-") else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return namespace, unknown


class _Version(argparse.Action):
    """Prints the versions that a result depends on."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        import torch

        import moe_kernels

        ours, python = moe_kernels.__version__, platform.python_version()
        print(f"rter of moe_kernels {ours}, torch {torch.__version__}, Python {python}")
        parser.exit()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, at least 0, got {text!r}")
    return seconds


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="rter", description="Adversarially robust Mixture-of-Experts: train, evaluate, report.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions of rter, torch and Python")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    methods = "\n".join(f"  {name:13} {method.summary}" for name, method in METHODS.items())
    train = commands.add_parser("train", help="train a model into a new folder", description=TRAIN,
                                epilog=f"methods:\n{methods}\n{SYMBOLS}",
                                formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    train.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder to make, for weights and metrics")
    train.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML or JSON file of settings, such as docs/configs/*.toml, which the flags override",
    )
    train.add_argument("--resume", action="store_true", help="continue the run in --out, if there is one")
    train.add_argument(
        "--save-every", type=_seconds, default=120.0, metavar="SECONDS", help="time between two savings of the state "
        "that --resume continues from (default: 120)"
    )  # fmt: skip
    _add_device(train)
    train.add_argument(
        "--expert-parallel", type=_positive, default=1, metavar="N", help="spread the experts over the N processes of "
        "torchrun, so that each has E / N of them (default: 1, all experts in each)"
    )  # fmt: skip
    train.add_argument("--tensorboard", action="store_true", help="write the metrics for TensorBoard too")
    _add_settings(train)

    evaluate = commands.add_parser("evaluate", help="measure a model under attack: that of a run, or any other",
                                   description=EVALUATE)  # fmt: skip
    evaluate.add_argument("run_folder", type=Path, nargs="?", metavar="RUN", help="folder made by `rter train`")
    evaluate.add_argument("--weights", metavar="WHICH", help="for a RUN: last, or best, chosen on the held-out images "
                          "(default: last); for a --model: a file, safetensors or a state dict")  # fmt: skip
    _add_strength(evaluate, suite="full")
    evaluate.add_argument(
        "--queries", type=_positive, default=5000, help="queries of AutoAttack's Square (default: 5000)"
    )
    evaluate.add_argument("--images", type=_positive, metavar="N", help="measure on N of the test images, drawn by the "
                          "seed in the proportions of the classes (default: all)")  # fmt: skip
    evaluate.add_argument("--data-dir", metavar="DIR", help="folder of the data set's files (default: where a RUN had "
                          "them; of a --model: data)")  # fmt: skip
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="folder for the report, and until then for what is "
                          "done (default: the RUN)")  # fmt: skip
    add_model_arguments(evaluate)
    _add_device(evaluate)

    export = commands.add_parser("export", help="copy what `rter evaluate` needs of a run, with the weights in fp16")
    export.add_argument("run_folder", type=Path, metavar="RUN", help="folder made by `rter train`")
    export.add_argument("--weights", choices=("last", "best"), default="last", help="which (default: last)")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    export.add_argument("--standard", type=Path, metavar="RUN", help="export a dual model: this run's as F_S, the "
                        "first RUN's as F_R")  # fmt: skip
    export.add_argument("--dual-alpha", type=float, metavar="ALPHA", help="the weight of F_R (default: that of the "
                        "first RUN's settings)")  # fmt: skip
    export.add_argument("--dual-mix", choices=CHOICES["dual_mix"], help="what is mixed (default: likewise)")

    report = commands.add_parser("report", help="write report.html and report.md of a run or a sweep; of several "
                                 "runs a page that compares them")  # fmt: skip
    report.add_argument(
        "run_folders", type=Path, nargs="+", metavar="RUN", help="folder of `rter evaluate`, or one of `rter sweep`"
    )
    report.add_argument(
        "--baselines", type=Path, nargs="+", default=[], metavar="RUN", help="evaluated runs to compare"
    )
    report.add_argument("--out", type=Path, default=Path("comparison.html"), metavar="FILE", help="the page of several "
                        "runs (default: comparison.html)")  # fmt: skip

    demo = commands.add_parser("demo", help="train, evaluate and compare standard training and RT-ER")
    demo.add_argument("--out", type=Path, required=True, help="folder to make, with a run for each method")
    _add_settings(demo, without=("method",))
    _add_strength(demo, suite="quick")

    sweep = commands.add_parser("sweep", help="all methods over several seeds, in one table of means and deviations")
    sweep.add_argument("--out", type=Path, required=True, help="folder of the runs; finished ones in it are kept")
    sweep.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    sweep.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="some of the methods, or dense-pgd-at; default: all"
    )
    sweep.add_argument(
        "--ablation", action="store_true", help="RT-ER without one part of the recipe at a time, instead"
    )
    sweep.add_argument(
        "--equal-time", action="store_true", help="train every method for as many epochs as fit into RT-ER's time"
    )
    sweep.add_argument("--jobs", type=_positive, default=1, help="runs at a time, sharing the cores (default: 1)")
    _add_settings(sweep, without=("method", "seed"))
    _add_strength(sweep, suite="full")

    add_data_command(commands)
    return parser


def _add_settings(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """Adds one flag per setting of Config."""
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for field in dataclasses.fields(Config):
        if field.name not in without:
            choices = CHOICES.get(field.name)
            owners = {name: own[field.name] for name, own in OWN_DEFAULTS.items() if field.name in own}
            own_defaults = "".join(f"; {value} for {name}" for name, value in owners.items())
            default = f"default: {field.metadata['default'] or NOTHING[field.type]}{own_defaults}"
            one_of = f"one of {', '.join(choices)}; " if choices else ""
            text = f"{field.metadata['help']} ({one_of}{default})".replace("%", "%%")
            flag = "--" + field.name.replace("_", "-")
            kind: dict[str, Any] = {"metavar": "NAME" if choices else METAVARS.get(field.type)}
            if field.type is bool:
                kind = {"action": "store_const", "const": True}
            groups[field.metadata["group"]].add_argument(flag, dest=f"set_{field.name}", help=text, **kind)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: a GPU, if there is one)")


def _add_strength(parser: argparse.ArgumentParser, suite: str) -> None:
    parser.add_argument("--suite", choices=tuple(RESTARTS), default=suite, help="attacks: PGD on the whole model "
                        "alone; the quick ones, also on the experts and the route; or also AutoAttack and every attack "
                        f"on the route (default: {suite})")  # fmt: skip
    parser.add_argument("--steps", type=_positive, default=50, help="steps of PGD and APGD (default: 50)")
    parser.add_argument("--restarts", type=_positive, help="PGD restarts on the whole model (default: 1, in the quick "
                        "suite 5, in the full one 20)")  # fmt: skip
