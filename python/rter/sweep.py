"""Methods, or parts of the recipe, trained and evaluated with several seeds, in one comparison."""

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rter.checkpoint import read_json, read_report, run_config, write_json
from rter.comparison import write_comparison
from rter.config import Config
from rter.console import Progress
from rter.errors import UserError
from rter.evaluate import TrainedRun, evaluate
from rter.rows import ABLATION, Rows
from rter.settings import make_config
from rter.strength import Effort
from rter.train import seconds_per_step, train
from rter.wording import summary


def sweep(
    out: Path,
    seeds: Sequence[int],
    settings: dict[str, Any],
    rows: Rows,
    effort: Effort,
    equal_time: bool = False,
    jobs: int = 1,
) -> Path:
    """Trains and evaluates each row with each seed in a folder of its own; returns the path of the comparison.

    Args:
        rows: ABLATION, or some of ROWS.
        effort: of the attacks on each run.
        equal_time: train every row for as many epochs as fit into the training time of the row "rt-er", according to
            the time of a step of each, which is measured in turns and kept in equal-time.json.
        jobs: runs at a time, each in a process of its own with an equal number of the threads.

    A finished run is kept and an unfinished one resumed, so a sweep that was stopped can be continued, and an ablation
    in the same folder reuses the first row.
    """
    out.mkdir(parents=True, exist_ok=True)
    epochs = _equal_epochs(out / "equal-time.json", settings, rows) if equal_time else {}
    tasks = []
    for name, row in rows.items():
        for seed in seeds:
            trained_for = {"epochs": epochs[name]} if equal_time else {}
            config = make_config(**(settings | row | trained_for | {"seed": seed}))
            tasks.append((out / f"{name.replace(' ', '-')}-{seed}", config, effort))
    with _workers(jobs) as run_all, Progress("sweep", len(tasks), "run", leave=True) as progress:
        done = []
        for report in run_all(*zip(*tasks, strict=True)):
            done.append(report)
            progress.update()
    file = out / ("ablation" if rows is ABLATION else "methods")
    reports = {name: done[i * len(seeds) : (i + 1) * len(seeds)] for i, name in enumerate(rows)}
    write_json(file.with_suffix(".json"), _figures(reports, list(seeds), epochs))
    return write_comparison(file)


def _finish(run: Path, config: Config, effort: Effort) -> dict[str, Any]:
    if (run / "report.json").exists():
        report = read_report(run)
        attack = report["attack"]["steps"], report["attack"]["restarts"], report["suite"]
        if run_config(run, config.data_dir) != config or attack != (effort.steps, effort.whole_restarts, effort.suite):
            raise UserError(f"--out holds {run} with other settings: give another folder, or remove it first")
        return report
    train(config, run, resume=True)
    return evaluate(TrainedRun(run), effort, progress=True)


@contextmanager
def _workers(jobs: int) -> Iterator[Any]:
    """A `map` of `_finish` that runs `jobs` calls at a time.

    Ctrl-C reaches this process alone, which then terminates the workers, whatever they are at: training stops after its
    step.
    """
    if jobs == 1:
        yield functools.partial(map, _finish)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=_start_worker, initargs=(threads,)) as pool:

        def run_all(*tasks: Sequence[Any]) -> Iterator[Any]:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which the workers inherit
            try:
                return pool.map(_finish_or_exit, *tasks)
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

        try:
            yield run_all
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                workers = multiprocessing.active_children()
                for worker in workers:
                    worker.terminate()
                for worker in workers:
                    worker.join()
            raise


def _finish_or_exit(run: Path, config: Config, effort: Effort) -> dict[str, Any]:
    """In a worker; one that is stopped ends, and takes up no other run."""
    try:
        return _finish(run, config, effort)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGTERM)


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    os.environ["TQDM_DISABLE"] = "1"  # several bars at a time overwrite each other
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # instead of one for several processes, which a worker that is stopped would leak


def _equal_epochs(file: Path, settings: dict[str, Any], rows: Rows) -> dict[str, int]:
    """For each row, the epochs that take as long as "rt-er" does; read from the file if it exists."""
    if "rt-er" not in rows:
        raise UserError(f"--methods must include rt-er with --equal-time, got {', '.join(rows)}")
    if 0 in (make_config(**(settings | row)).epochs for row in rows.values()):
        raise UserError("epochs must be above 0 with --equal-time, got 0")
    known = read_json(file, {str: {"epochs": int}}) if file.exists() else {}
    if not rows.keys() <= known.keys():
        configs = {name: make_config(**(settings | row)) for name, row in rows.items()}
        seconds = dict(zip(rows, seconds_per_step(list(configs.values())), strict=True))
        time = configs["rt-er"].epochs * seconds["rt-er"]
        known = {name: {"seconds per step": s, "epochs": max(1, round(time / s))} for name, s in seconds.items()}
        write_json(file, known)
    return {name: known[name]["epochs"] for name in rows}


def _figures(reports: dict[str, list[dict[str, Any]]], seeds: list[int], epochs: dict[str, int]) -> dict[str, Any]:
    """What `write_comparison` reads: every figure of every seed, without times, since the runs shared a machine."""
    rows = {}
    for name, runs in reports.items():
        summaries = [summary(report) for report in runs]
        rows[name] = {key: [each[key] for each in summaries] for key in summaries[0] if key != "train s"}
    return {"seeds": seeds, "equal_time_epochs": epochs, "rows": rows}
