"""The training loop; its results are determined by the configuration alone."""

import contextlib
import copy
import signal
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_kernels import build_info
from rter import console
from rter.checkpoint import (
    append_line,
    demand_usable,
    keep_lines,
    open_run,
    read_lines,
    save_tensors,
    save_weights,
    write_atomic,
    write_csv,
)
from rter.config import Config
from rter.console import Progress, say, stop_signals
from rter.data.augment import make_augment
from rter.data.load import load_data
from rter.data.split import Data, Split
from rter.distributed import Share, choose_device, processes, spread_experts, wait_for_all, whole
from rter.errors import NonFiniteError, Stopped, UserError
from rter.evaluate import quick_accuracies
from rter.intervals import wilson
from rter.methods import METHODS
from rter.methods.step import Step
from rter.methods.update import update
from rter.models.build import build_model
from rter.models.classifier import RobustClassifier
from rter.models.initial import load_initial
from rter.optimisation import RunningMean, make_optimizer, running_statistics, set_rate, upcycle
from rter.ranks import is_first, num_processes
from rter.resume import State, circumstances
from rter.settings import RESUME
from rter.tensorboard import Board


def train(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    save_every: float = 120.0,
    tensorboard: bool = False,
    device: str | None = None,
    expert_parallel: int = 1,
) -> bool:
    """Trains a model into the folder `out`; returns False if the run there was finished already.

    Args:
        resume: continue the run in `out`, if there is one.
        save_every: seconds between two savings of the state from which training can resume.
        tensorboard: write the metrics for TensorBoard too.
        expert_parallel: number of processes over which the experts are spread: all of them, or 1.

    Raises:
        UserError: if the folder cannot be used, or if the loss becomes NaN or infinite.
    """
    # Until a process sets a number of threads, MKL chooses one call by call, and rounding varies with it.
    torch.set_num_threads(torch.get_num_threads())
    where = choose_device(device)
    if is_first():
        demand_usable(out, resume)  # before data are read, which may take minutes
    if config.amp == "bf16" and where.type == "cpu" and is_first() and build_info()["cpu_bf16"] == "emulated":
        say("amp bf16: this CPU has no instructions for bfloat16 and emulates them, so fp32 (amp none) may be faster")
    data = load_data(config.data, config.held_out, config.seed, config.data_dir, config.image_size, config.train_images)
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes())
        board = Board(out) if tensorboard and is_first() else None
        training = _Training(config, out, data.to(where), board, expert_parallel)
        if is_first():
            stack.enter_context(open_run(out, config, resume))
        wait_for_all()
        return training.run(save_every)


def seconds_per_step(configs: Sequence[Config], rounds: int = 15) -> list[float]:
    """Seconds per training step of each configuration: medians of steps taken in turns, of which the mean over the
    first and the last epoch."""
    trainings = []
    for config in configs:
        data = load_data(
            config.data, config.held_out, config.seed, config.data_dir, config.image_size, config.train_images
        )
        trainings.append(_Training(config, Path(), data.to(choose_device()), None))
    taken: list[dict[int, list[float]]] = [{0: [], config.epochs - 1: []} for config in configs]
    for _ in range(rounds):
        for training, times in zip(trainings, taken, strict=True):
            for epoch in times:
                times[epoch].append(training.timed_step(epoch))
    return [statistics.mean(statistics.median(each) for each in times.values()) for times in taken]


class _Training:
    def __init__(self, config: Config, out: Path, data: Data, board: Board | None, expert_parallel: int = 1) -> None:
        self.config, self.out, self.data, self.board = config, out, data, board
        self.augment = make_augment(config)
        if config.batch_size > len(data.train):
            images = f"the number of training images, {len(data.train)}"
            raise UserError(f"batch_size must be at most {images}, got {config.batch_size}")
        if config.train_attack == "fgsm-pgi" and num_processes() > 1:
            raise UserError(
                "train_attack must not be fgsm-pgi with several processes, since each would keep its own perturbations"
            )
        self.share = Share.of(config.batch_size)
        self.steps = len(data.train) // self.share.total  # per epoch
        model = build_model(config, data)
        if config.init:
            load_initial(model, Path(config.init))
        model.to(data.train.y.device)
        self.alone = None
        if expert_parallel > 1:
            if config.upcycle:
                raise UserError(f"upcycle must be 0 with experts spread over processes, got {config.upcycle:g}")
            self.alone = copy.deepcopy(model)  # the whole model, with which the first process evaluates
            spread_experts(model, expert_parallel)
        optimizer = make_optimizer(config, model)
        self.state = State(model, optimizer, RunningMean(model, config.ema) if config.ema else None)
        self.saved = time.monotonic()
        self.collapsed = ""
        self.told = 0.0  # the run's seconds at the end of the last epoch

    def run(self, save_every: float) -> bool:
        state, out, total = self.state, self.out, self.config.epochs * self.steps
        if (out / RESUME).exists():
            state.load(out / RESUME)
            if state.step == total:
                return False
        if is_first():
            keep_lines(out / "metrics.jsonl", state.step // self.steps)
            _note_differences(state.began, circumstances(), out)
            self._take_up(read_lines(out / "metrics.jsonl") if state.step >= self.steps else [])
        state.began = circumstances()
        if total == 0:
            self._keep_initial()
        progress = Progress(
            out.name,
            total,
            "step",
            done=state.step,
            shown=is_first(),
            leave=True,
            each=self.share.total,
            epoch=self.steps,
        )
        with progress, stop_signals() as stop:
            for epoch in range(state.step // self.steps, self.config.epochs):
                order = self._order(epoch)
                for i in range(state.step % self.steps, self.steps):
                    loss = self._step(order[i * self.share.total : (i + 1) * self.share.total], epoch, total)
                    if i + 1 == self.steps:
                        progress.note(self._finish(epoch))
                    asked = bool(stop.asked or self.collapsed)
                    stopped = self.share.any(asked, loss.device) and state.step < total
                    overdue = time.monotonic() - self.saved >= save_every
                    if self._jointly(state.step == total or stopped or overdue):
                        state.save(out / RESUME)
                        self.saved = time.monotonic()
                    progress.update(fact=lambda loss=loss: f"loss {loss.item():.4g}")  # type: ignore[misc]
                    if stopped and self.collapsed:
                        raise UserError(self.collapsed)
                    if stopped:
                        raise Stopped(
                            f"stopped after step {state.step} of {total}, saved", stop.asked or signal.SIGTERM
                        )
        if self.collapsed:
            say(self.collapsed)
        return True

    def _take_up(self, lines: Sequence[dict[str, Any]]) -> None:
        """Continues after the finished epochs, unless the run collapsed in the last of them."""
        if lines:
            self.told = lines[-1]["seconds"]
            if lines[-1].get("collapsed") and self.config.collapse:
                raise UserError(self._collapse(lines[-1]))

    def _has_collapsed(self, ra: float) -> bool:
        """Whether ra is below the part --collapse of its best by more than so few images may be off by chance."""
        images, best = len(self.data.held_out), self.state.best
        return ra < self.config.collapse * best and wilson(ra, images)[1] < wilson(best, images)[0]

    def _collapse(self, metrics: dict[str, Any]) -> str:
        return (
            f"the run in {self.out} collapsed in epoch {metrics['epoch']} (catastrophic overfitting): accuracy under "
            f"PGD on held-out images {metrics['ra']:.3f} after {self.state.best:.3f}; best.safetensors is from before, "
            "and --train-attack n-fgsm or pgd, or a smaller --lr, may help"
        )

    def _keep_initial(self) -> None:
        """Writes the files of a run of 0 epochs."""
        model = self._whole(self.state.model)
        if is_first():
            for name in ("last", "best"):
                save_weights(self.out / f"{name}.safetensors", model)
            write_atomic(self.out / "metrics.jsonl", "")
        if self._jointly(True):
            self.state.save(self.out / RESUME)

    def _jointly(self, answer: bool) -> bool:
        """Whether this process takes part in what the first one decides; if experts are spread, all do."""
        first = is_first() and answer
        return first if self.alone is None else self.share.any(first, self.data.train.y.device)

    def _whole(self, model: RobustClassifier) -> RobustClassifier:
        """The model with all experts in this process."""
        if self.alone is None:
            return model
        self.alone.load_state_dict({name: whole(t) for name, t in model.state_dict().items()})
        return self.alone

    def _order(self, epoch: int) -> Tensor:
        shuffle = torch.Generator().manual_seed(self.config.seed_for("shuffle", epoch))
        return torch.randperm(len(self.data.train), generator=shuffle)

    def _step(self, rows: Tensor, epoch: int, total: int) -> Tensor:
        """One update from the given rows of the training images; returns its loss."""
        started = time.perf_counter()
        state, config, share = self.state, self.config, self.share
        state.model.train()
        set_rate(state.optimizer, config, state.step, total)
        step = Step(state.model, config, state.step, epoch=epoch, share=share, priors=state.priors)
        chance = torch.Generator().manual_seed(config.seed_for("augment", step.index))
        joint, ours = self.data.train[rows], slice(share.start, share.stop)
        batch = Split(self.augment(joint.x, chance)[ours], joint.y[ours])
        try:
            terms = update(step, state.optimizer, batch)
        except NonFiniteError as error:
            path = self.out / "nan-batch.safetensors"
            found = {f"x_adv.{i}": x_adv for i, x_adv in enumerate(step.found)}
            values = {f"term.{name}": value for name, value in step.terms.items()}
            save_tensors(path, {"x": batch.x, "y": batch.y, "rows": rows[ours], **found, **values})
            raise UserError(f"{error} at step {step.index}: a lower lr may help; the batch is in {path}") from None
        share.mean_(list(terms.values()))
        share.mean_(running_statistics(state.model))
        if state.ema:
            state.ema.update(state.model, state.step)
        state.step += 1
        state.records.append(terms)
        state.seconds += time.perf_counter() - started
        return terms["loss"]

    def timed_step(self, epoch: int) -> float:
        """Seconds of a step on the first batch of an epoch."""
        before = self.state.seconds
        self._step(self._order(epoch)[: self.share.total], epoch, self.config.epochs * self.steps)
        return self.state.seconds - before

    def _finish(self, epoch: int) -> dict[str, str]:
        """Writes the metrics of an epoch, and the weights if it is one that is evaluated."""
        state, config, out = self.state, self.config, self.out
        metrics: dict[str, Any] = {"epoch": epoch + 1, **_means(state.records), "seconds": round(state.seconds, 3)}
        state.records = []
        if config.upcycling(epoch):
            upcycle(state.model, state.optimizer)
            if state.ema:
                upcycle(state.ema.model)
        evaluated = (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs
        model = state.ema.model if state.ema else state.model
        if evaluated:
            model = self._whole(model)
        if not is_first():
            return {}
        if evaluated:
            metrics |= quick_accuracies(model, config, self.data.held_out)
            save_weights(out / "last.safetensors", model)
            best_by = METHODS[config.method].best_by
            if metrics[best_by] > state.best:
                state.best = metrics[best_by]
                save_weights(out / "best.safetensors", model)
            if config.train_attack != "pgd" and self._has_collapsed(metrics["ra"]):
                metrics["collapsed"] = True
                self.collapsed = self._collapse(metrics)
        append_line(out / "metrics.jsonl", metrics)
        if evaluated:
            write_csv(out / "metrics.csv", read_lines(out / "metrics.jsonl"))
        if self.board:
            self.board.add(metrics)
        facts: dict[str, str] = {name: f"{metrics[name]:.3f}" for name in ("loss", "sa", "ra") if name in metrics}
        self._say_epoch(metrics, facts)
        return facts

    def _say_epoch(self, metrics: dict[str, Any], facts: dict[str, str]) -> None:
        """Prints a line about an epoch that took longer than the interval between lines of progress."""
        seconds, self.told = metrics["seconds"] - self.told, metrics["seconds"]
        if seconds >= console.EVERY:
            rate = self.steps * self.share.total / seconds
            found = ", ".join(f"{name} {value}" for name, value in facts.items())
            epoch = f"epoch {metrics['epoch']} of {self.config.epochs}"
            say(f"{self.out.name}: {epoch} took {seconds:.0f} s, {rate:.3g} images/s: {found}")


def _note_differences(before: dict[str, int | str], now: dict[str, int | str], out: Path) -> None:
    other = [name for name in now if before[name] != now[name]]
    if other:
        began, goes_on = (", ".join(f"{name} {found[name]}" for name in other) for found in (before, now))
        say(f"the run in {out} began with {began} and continues with {goes_on}, so its weights will not be bit for bit "
            "those of an uninterrupted run")  # fmt: skip


def _means(records: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    return {name: round(torch.stack([r[name] for r in records]).mean().item(), 6) for name in records[0]}
