"""The training loop; what it produces follows from the configuration alone."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from rter.checkpoint import append_line, create_run, save_weights
from rter.config import Config
from rter.data import Split, load_data
from rter.data.augment import make_augment
from rter.evaluate import quick_accuracies
from rter.methods import METHODS
from rter.methods.step import Step
from rter.methods.update import update
from rter.models import build_model
from rter.models.initial import load_initial


def train(config: Config, out: Path) -> None:
    """Trains a model into the folder `out`: config.json, metrics.jsonl, last.safetensors and best.safetensors."""
    data = load_data(config.data, config.held_out, config.seed, config.data_dir, config.image_size)
    augment = make_augment(config)
    batch_size = min(config.batch_size, len(data.train))
    steps = len(data.train) // batch_size  # per epoch
    model = build_model(config, data)
    if config.init:
        load_initial(model, Path(config.init))
    create_run(out, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=config.lr, total_steps=config.epochs * steps)
    best_by, best, seconds = METHODS[config.method].best_by, -1.0, 0.0
    progress = tqdm(range(config.epochs), desc=out.name, unit="epoch", disable=not sys.stderr.isatty())
    for epoch in progress:
        started = time.perf_counter()
        model.train()
        shuffle = torch.Generator().manual_seed(config.seed_for("shuffle", epoch))
        order = torch.randperm(len(data.train), generator=shuffle)
        records = []
        for i in range(steps):
            step = Step(model, config, epoch * steps + i, epoch=epoch)
            batch = data.train[order[i * batch_size : (i + 1) * batch_size]]
            chance = torch.Generator().manual_seed(config.seed_for("augment", step.index))
            records.append(update(step, optimizer, Split(augment(batch.x, chance), batch.y)))
            schedule.step()
        seconds += time.perf_counter() - started
        metrics = {"epoch": epoch + 1, **_means(records), "seconds": round(seconds, 3)}
        if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
            metrics |= quick_accuracies(model, config, data.held_out)
            save_weights(out / "last.safetensors", model)
            if metrics[best_by] > best:
                best = metrics[best_by]
                save_weights(out / "best.safetensors", model)
        append_line(out / "metrics.jsonl", metrics)
        progress.set_postfix({name: f"{metrics[name]:.3f}" for name in ("loss", "sa", "ra") if name in metrics})


def _means(records: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    return {name: round(torch.stack([r[name] for r in records]).mean().item(), 6) for name in records[0]}
