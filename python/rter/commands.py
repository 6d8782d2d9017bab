"""The commands: rter train | evaluate | report | demo | sweep | data."""

import argparse
import dataclasses
import io
import os
import platform
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

import moe_kernels
from rter.checkpoint import run_config
from rter.config import GROUPS, Config
from rter.console import handling, say
from rter.data.command import add_command as add_data_command
from rter.distributed import is_first, num_processes
from rter.errors import Stopped, UserError, did_you_mean
from rter.evaluation import QUERIES, RESTARTS, Effort
from rter.foreign import EVALUATE, add_model_arguments, check_model_arguments, evaluate_file
from rter.methods import METHODS
from rter.settings import CHOICES, OWN_DEFAULTS, load_settings, make_config

TRAIN = """Trains a model into a new folder. A setting comes from its flag, or from the file given by --config, or it is
the default. On several GPUs, or in several processes: torchrun --nproc-per-node N -m rter train ..."""

NOTHING: dict[Any, str] = {bool: "no", str: "none", int: "0", float: "0"}
METAVARS: dict[Any, str] = {str: "TEXT", int: "N", float: "NUMBER"}

SYMBOLS = """
F is the model, f_e expert e alone, s the expert of --second, r the router; x1, x2 and x_e are x under attack, by PGD
where nothing else is said. CE is the cross-entropy, KL the divergence of the softmaxes, balance(x) the Switch loss that
keeps all experts in use. beta, gamma, lambda and alpha are --beta, --clean-weight, --balance-weight and --dual-alpha.

As mixtures, standard, pgd-at and trades are the baselines standard MoE, AT-MoE and TRADES-MoE; with --num-experts 1
they train one dense network. AWP, EMA, bf16 and the schedules go with every method. docs/methods.md says more."""


class _Parser(argparse.ArgumentParser):
    """Mistakes are one line on stderr, which names what may have been meant.

    A flag must be written out: --alpha would otherwise be taken for --alpha-ratio, a part of eps.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        meant = did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2])) if choice else ""
        raise UserError(f"{message}{meant} (see `{self.prog} --help`)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuses what is unknown here, where the command and so its flags are known."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            meant = did_you_mean(flag, self._option_string_actions) if flag.startswith("-") else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return namespace, unknown


class _Version(argparse.Action):
    """Prints the versions that a result depends on."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
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
    train.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    train.add_argument(
        "--save-every", type=_seconds, default=120.0, metavar="SECONDS", help="time between two savings of the state "
        "from which --resume goes on (default: 120)"
    )  # fmt: skip
    _add_device(train)
    train.add_argument(
        "--expert-parallel", type=_positive, default=1, metavar="N", help="spread the experts over the N processes of "
        "torchrun, so that each has E / N of them (default: 1, all experts in each)"
    )  # fmt: skip
    train.add_argument("--tensorboard", action="store_true", help="write the metrics for TensorBoard too")
    _add_settings(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="measure a model under attack: that of a run, or anybody's",
                                   description=EVALUATE)  # fmt: skip
    evaluate.add_argument("run_folder", type=Path, nargs="?", metavar="RUN", help="folder made by `rter train`")
    evaluate.add_argument("--weights", metavar="WHICH", help="of a RUN: last, or best (default: last, which no look at "
                          "the held-out images chose); of a --model: a file, safetensors or a state dict")  # fmt: skip
    _add_strength(evaluate, suite="full")
    evaluate.add_argument("--queries", type=_positive, default=5000, help="of AutoAttack's Square (default: 5000)")
    evaluate.add_argument("--images", type=_positive, metavar="N", help="measure on N of the test images, drawn by the "
                          "seed in the proportions of the classes (default: all)")  # fmt: skip
    evaluate.add_argument("--data-dir", metavar="DIR", help="folder of the data set's files (default: where a RUN had "
                          "them; of a --model: data)")  # fmt: skip
    add_model_arguments(evaluate)
    _add_device(evaluate)
    evaluate.set_defaults(run=_evaluate)

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
    report.set_defaults(run=_report)

    demo = commands.add_parser("demo", help="train, evaluate and compare standard training and RT-ER")
    demo.add_argument("--out", type=Path, required=True, help="folder to make, with a run for each method")
    _add_settings(demo, without=("method",))
    _add_strength(demo, suite="quick")
    demo.set_defaults(run=_demo)

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
    sweep.set_defaults(run=_sweep)

    add_data_command(commands)
    return parser


def _add_settings(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """One flag per setting of Config."""
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for field in dataclasses.fields(Config):
        if field.name not in without:
            choices = CHOICES.get(field.name)
            owners = {name: own[field.name] for name, own in OWN_DEFAULTS.items() if field.name in own}
            own_defaults = "".join(f"; {value} for {name}" for name, value in owners.items())
            default = f"default: {field.metadata['default'] or NOTHING[field.type]}{own_defaults}"
            one_of = f"one of {', '.join(choices)}; " if choices else ""
            text = f"{field.metadata['help']} ({one_of}{default})"
            flag = "--" + field.name.replace("_", "-")
            kind: dict[str, Any] = {"metavar": "NAME" if choices else METAVARS.get(field.type)}
            if field.type is bool:
                kind = {"action": "store_const", "const": True}
            groups[field.metadata["group"]].add_argument(flag, dest=f"set_{field.name}", help=text, **kind)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: a GPU, if there is one)")


def _add_strength(parser: argparse.ArgumentParser, suite: str) -> None:
    parser.add_argument("--suite", choices=("quick", "full"), default=suite, help="attacks: the quick ones, or also "
                        f"AutoAttack and every attack on the route (default: {suite})")  # fmt: skip
    parser.add_argument("--steps", type=_positive, default=50, help="steps of PGD and APGD (default: 50)")
    parser.add_argument("--restarts", type=_positive, help="PGD restarts on the whole model (default: 5, in the full "
                        "suite 20)")  # fmt: skip


def _effort(args: argparse.Namespace, queries: int = QUERIES) -> Effort:
    return Effort(args.suite, args.steps, args.restarts or RESTARTS[args.suite], queries)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings given as flags."""
    flags = {name.removeprefix("set_"): value for name, value in vars(args).items() if name.startswith("set_")}
    return {name: value for name, value in flags.items() if value is not None}


def _train(args: argparse.Namespace) -> None:
    from rter.train import train

    before = dataclasses.asdict(run_config(args.out)) if args.resume and (args.out / "config.json").exists() else {}
    settings = load_settings(args.config) if args.config else {}
    config = make_config(**(before | settings | given_settings(args)))
    trained = train(
        config,
        args.out,
        resume=args.resume,
        save_every=args.save_every,
        tensorboard=args.tensorboard,
        device=args.device,
        expert_parallel=args.expert_parallel,
    )
    if is_first():
        print(f"{'trained' if trained else 'finished already'}: {args.out}; next: rter evaluate {args.out}")


def _evaluate(args: argparse.Namespace) -> None:
    from rter.evaluate import TrainedRun, evaluate
    from rter.report import name_of, table
    from rter.wording import summary, verdict

    check_model_arguments(args)
    effort = _effort(args, args.queries)
    if args.model:
        out = evaluate_file(args, effort)
    else:
        out = args.run_folder
        run = TrainedRun(out, args.weights or "last", args.images, args.data_dir, args.device)
        report = evaluate(run, effort, progress=True)
        print(table({name_of(out): summary(report)}))
        print(verdict(report))
    print(f"written: {out / 'report.json'}; next: rter report {out}")


def _report(args: argparse.Namespace) -> None:
    from rter.comparison import write_comparison
    from rter.report import compare, make_report

    run, *others = args.run_folders
    if others:
        if args.baselines:
            raise UserError("--baselines must be given with one RUN, got several, which are compared by themselves")
        print(compare(args.run_folders, args.out))
        print(f"written: {args.out}")
        return
    compared = [file.with_suffix("") for name in ("methods", "ablation") if (file := run / f"{name}.json").exists()]
    for written in map(write_comparison, compared):
        print(written.read_text(encoding="utf-8"))
    if not compared:
        print(make_report(run, args.baselines))
        print(f"written: {run / 'report.html'}, {run / 'report.md'}")


def _demo(args: argparse.Namespace) -> None:
    from rter.evaluate import TrainedRun, evaluate
    from rter.report import make_report
    from rter.train import train

    runs = {method: args.out / method for method in ("rt-er", "standard")}
    configs = {method: make_config(**(given_settings(args) | {"method": method})) for method in runs}
    for method, run in runs.items():
        train(configs[method], run)
        evaluate(TrainedRun(run), _effort(args), progress=True)
    print(make_report(runs["rt-er"], [runs["standard"]]))
    print(f"report: {runs['rt-er'] / 'report.html'}")


def _sweep(args: argparse.Namespace) -> None:
    from rter.sweep import ABLATION, ROWS, sweep

    names = {name.replace(" ", "-"): name for name in ROWS}
    for name in args.methods or ():
        if name not in names:
            meant = did_you_mean(name, names)
            raise UserError(f"--methods must be among {', '.join(names)}, got {name!r}{meant}")
    rows = ABLATION if args.ablation else {names[name]: ROWS[names[name]] for name in args.methods or names}
    settings, effort = given_settings(args), _effort(args)
    written = sweep(args.out, args.seeds, settings, rows, effort, equal_time=args.equal_time, jobs=args.jobs)
    print(written.read_text(encoding="utf-8"))
    print(f"written: {written}")


def run(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what its encoding lacks, such as ± in ASCII
    args = argparse.Namespace(command=None)
    try:
        with handling(_terminate, signal.SIGTERM):
            try:
                args = make_parser().parse_args(arguments)
                args.run(args)
            finally:
                sys.stdout.flush()
    except BrokenPipeError:  # who reads has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where what is buffered still goes
        return 1
    except KeyboardInterrupt as stopped:
        if is_first():
            say(f"{str(stopped) or 'stopped'}{_goes_on(args, sys.argv[1:] if arguments is None else arguments)}")
        return getattr(stopped, "status", 130)
    except (UserError, OSError) as error:
        return _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        return _fail(f"out of memory: num_experts, width, batch_size or image_size must be smaller ({reason})")
    return 0


def _terminate(number: int, frame: Any) -> None:
    raise Stopped("terminated", number)


def _goes_on(args: argparse.Namespace, words: list[str]) -> str:
    """The command that goes on with what was stopped, where there is one."""
    again = ["rter", *words]
    if args.command == "train" and (args.out / "resume.safetensors").exists():
        again = ["rter", "train", "--out", str(args.out), "--resume"]
        if num_processes() > 1:
            again = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "N"), "-m", *again]
    elif args.command not in ("evaluate", "sweep"):  # which keep what is finished
        return ""
    return f"; to go on: {shlex.join(again)}"


def _fail(message: str) -> int:
    print(f"rter: error: {message}", file=sys.stderr)
    return 2
