"""The state of a run between two steps, from which it resumes bit for bit."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rter.checkpoint import save_tensors
from rter.distributed import as_spread, whole
from rter.errors import UserError
from rter.models.classifier import RobustClassifier
from rter.optimisation import RunningMean
from rter.ranks import is_first, num_processes

SCALARS = ("step", "best", "seconds")


def circumstances() -> dict[str, int | str]:
    """What changes the rounding even if the configuration is the same."""
    return {
        "processes": num_processes(),
        "threads": torch.get_num_threads(),
        "CPU": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


@dataclass
class State:
    """All that the next step depends on besides the configuration. One file holds it, so all of it is from one step.

    Args:
        ema: None if the configuration asks for none.
        step: number of finished steps.
        best: highest held-out accuracy so far.
        seconds: time spent in training steps.
        priors: the perturbations that the next step's attacks start from, see `Step`.
        records: the loss terms of the finished steps of the current epoch.
        began: the circumstances in which the run began, or in which it was resumed if these were different.
    """

    model: RobustClassifier
    optimizer: torch.optim.Optimizer
    ema: RunningMean | None
    step: int = 0
    best: float = -1.0
    seconds: float = 0.0
    priors: dict[str, Tensor] = field(default_factory=dict)
    records: list[dict[str, Tensor]] = field(default_factory=list)
    began: dict[str, int | str] = field(default_factory=circumstances)

    def save(self, path: Path) -> None:
        """Writes the state in the first process; if experts are spread over processes, all must call it together."""
        tensors = {f"{part}/{name}": t for part, module in self._modules() for name, t in module.state_dict().items()}
        optimizer = self.optimizer.state_dict()
        for i, moments in optimizer["state"].items():
            tensors |= {f"optimizer/{i}/{name}": value for name, value in moments.items() if value is not None}
        tensors |= {f"priors/{name}": prior for name, prior in self.priors.items()}
        if self.records:
            tensors |= {f"records/{name}": torch.stack([r[name] for r in self.records]) for name in self.records[0]}
        scalars = {name: getattr(self, name) for name in SCALARS}
        scalars |= {"began": self.began, "groups": optimizer["param_groups"]}
        tensors = {name: whole(t) for name, t in tensors.items()}
        if is_first():
            save_tensors(path, tensors, {"state": json.dumps(scalars)})

    def load(self, path: Path) -> None:
        """Reads the state; raises UserError if the file is damaged or belongs to another configuration."""
        try:
            with safe_open(path, framework="pt") as file:
                scalars = json.loads(file.metadata()["state"])
                parts: dict[str, dict[str, Tensor]] = {
                    name: {} for name in ("model", "ema", "optimizer", "priors", "records")
                }
                for key in file.keys():  # noqa: SIM118, the file is not a mapping
                    part, name = key.split("/", 1)
                    parts[part][name] = file.get_tensor(key)
            for part, module in self._modules():
                own = module.state_dict()
                state = {name: as_spread(t, own[name]) if name in own else t for name, t in parts[part].items()}
                module.load_state_dict(state)
            moments: dict[int, dict[str, Any]] = {}
            weights = self.optimizer.param_groups[0]["params"]
            for key, tensor in parts["optimizer"].items():
                i, name = key.split("/", 1)
                moments.setdefault(int(i), {})[name] = as_spread(tensor, weights[int(i)])
            self.optimizer.load_state_dict({"state": moments, "param_groups": scalars["groups"]})
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} is damaged or not of this run: {' '.join(str(error).split())}") from None
        for name in SCALARS:
            setattr(self, name, scalars[name])
        self.began |= scalars.get("began", {})
        where = next(self.model.parameters()).device
        self.priors = {name: prior.to(where) for name, prior in parts["priors"].items()}
        columns = [[(name, value) for value in values.to(where).unbind()] for name, values in parts["records"].items()]
        self.records = [dict(record) for record in zip(*columns, strict=True)]

    def _modules(self) -> list[tuple[str, RobustClassifier]]:
        return [("model", self.model)] + ([("ema", self.ema.model)] if self.ema else [])
