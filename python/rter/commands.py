"""The commands: train, evaluate, export, report, demo, sweep, data. Large modules are imported when they are used."""

import argparse
import dataclasses
import io
import os
import shlex
import signal
import sys
from typing import Any

from rter.console import handling, say
from rter.errors import Stopped, UserError, did_you_mean
from rter.model_arguments import check_model_arguments
from rter.parser import make_parser
from rter.ranks import is_first, num_processes
from rter.rows import ABLATION, ROWS
from rter.settings import RESUME, load_settings, make_config
from rter.strength import QUERIES, RESTARTS, Effort


def _effort(args: argparse.Namespace, queries: int = QUERIES) -> Effort:
    return Effort(args.suite, args.steps, args.restarts or RESTARTS[args.suite], queries)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings given as flags."""
    flags = {name.removeprefix("set_"): value for name, value in vars(args).items() if name.startswith("set_")}
    return {name: value for name, value in flags.items() if value is not None}


def _train(args: argparse.Namespace) -> None:
    before = {}
    if args.resume and (args.out / "config.json").exists():
        from rter.checkpoint import run_config

        before = dataclasses.asdict(run_config(args.out))
    settings = load_settings(args.config) if args.config else {}
    config = make_config(**(before | settings | given_settings(args)))
    from rter.train import train

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
    check_model_arguments(args)
    effort = _effort(args, args.queries)
    if args.model:
        from rter.foreign import evaluate_file

        out = evaluate_file(args, effort)
    else:
        from rter.evaluate import TrainedRun, evaluate
        from rter.report import name_of, table
        from rter.wording import summary, verdict

        out = args.out or args.run_folder
        weights = args.weights or "last"
        run = TrainedRun(args.run_folder, weights, args.images, args.data_dir, args.device, args.out)
        report = evaluate(run, effort, progress=True)
        print(table({name_of(out): summary(report)}))
        print(verdict(report))
    print(f"written: {out / 'report.json'}; next: rter report {out}")


def _export(args: argparse.Namespace) -> None:
    from rter.export import export

    mixing = {"dual_alpha": args.dual_alpha, "dual_mix": args.dual_mix}
    for name, value in mixing.items():
        if value is not None and not args.standard:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} must be given with --standard, a run to make a dual model of")
    file = export(args.run_folder, args.weights, args.out, standard=args.standard, **mixing)
    weights = "" if args.weights == "last" else f" --weights {args.weights}"
    print(
        f"written: {file}, {file.stat().st_size / 1e6:.2f} MB; next: rter evaluate {args.out}{weights} --data-dir DIR"
    )


def _report(args: argparse.Namespace) -> None:
    run, *others = args.run_folders
    if others and args.baselines:
        raise UserError("--baselines must be given with one RUN, got several, which are compared without it")
    from rter.comparison import write_comparison
    from rter.report import compare, make_report

    if others:
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
    runs = {method: args.out / method for method in ("rt-er", "standard")}
    configs = {method: make_config(**(given_settings(args) | {"method": method})) for method in runs}
    from rter.evaluate import TrainedRun, evaluate
    from rter.report import make_report
    from rter.train import train

    for method, run in runs.items():
        train(configs[method], run)
        evaluate(TrainedRun(run), _effort(args), progress=True)
    print(make_report(runs["rt-er"], [runs["standard"]]))
    print(f"report: {runs['rt-er'] / 'report.html'}")


def _sweep(args: argparse.Namespace) -> None:
    names = {name.replace(" ", "-"): name for name in ROWS}
    for name in args.methods or ():
        if name not in names:
            meant = did_you_mean(name, names)
            raise UserError(f"--methods must be among {', '.join(names)}, got {name!r}{meant}")
    rows = ABLATION if args.ablation else {names[name]: ROWS[names[name]] for name in args.methods or names}
    settings, effort = given_settings(args), _effort(args)
    for row in rows.values():
        make_config(**(settings | row))
    from rter.sweep import sweep

    written = sweep(args.out, args.seeds, settings, rows, effort, equal_time=args.equal_time, jobs=args.jobs)
    print(written.read_text(encoding="utf-8"))
    print(f"written: {written}")


def _data(args: argparse.Namespace) -> None:
    args.run(args)


COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "export": _export,
    "report": _report,
    "demo": _demo,
    "sweep": _sweep,
    "data": _data,
}


def run(arguments: list[str] | None = None) -> int:
    """Runs one command from the words of the command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for characters that its encoding lacks, such as ± in ASCII
    args = argparse.Namespace(command=None)
    try:
        with handling(_terminate, signal.SIGTERM):
            try:
                args = make_parser().parse_args(arguments)
                COMMANDS[args.command](args)
            finally:
                sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still buffered
        return 1
    except KeyboardInterrupt as stopped:
        if is_first():
            say(f"{str(stopped) or 'stopped'}{_goes_on(args, sys.argv[1:] if arguments is None else arguments)}")
        return getattr(stopped, "status", 130)
    except (UserError, OSError) as error:
        return _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
                or "can't allocate memory" in str(error)):  # fmt: skip
            raise
        reason = str(error).strip().partition("\n")[0]
        return _fail(f"out of memory: num_experts, width, batch_size or image_size must be smaller ({reason})")
    return 0


def _terminate(number: int, frame: Any) -> None:
    raise Stopped("terminated", number)


def _goes_on(args: argparse.Namespace, words: list[str]) -> str:
    """The end of a message, with the command that resumes what was stopped, if there is one."""
    again = ["rter", *words]
    if args.command == "train" and (args.out / RESUME).exists():
        again = ["rter", "train", "--out", str(args.out), "--resume"]
        if num_processes() > 1:
            again = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "N"), "-m", *again]
    elif args.command not in ("evaluate", "sweep"):  # these keep what is finished
        return ""
    return f"; to resume: {shlex.join(again)}"


def _fail(message: str) -> int:
    print(f"rter: error: {message}", file=sys.stderr)
    return 2
