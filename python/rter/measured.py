"""The result of an evaluation: its figures, and examples of adversarial images."""

import json
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import moe_kernels
from rter.checkpoint import load_tensors, read_json, read_report, save_tensors, write_atomic
from rter.console import say
from rter.errors import UserError
from rter.evaluation import AttackResult, Evaluation
from rter.journal import difference
from rter.wording import distance


class Accuracy(NamedTuple):
    """A fraction of the images, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:7.2%}   [{self.low:.2%}, {self.high:.2%}]"


def made_with(device: torch.device) -> dict[str, Any]:
    """The versions and the machine that figures depend on."""
    if device.type == "cuda":
        name, threads = torch.cuda.get_device_name(device), None
    else:
        cpu = re.search(r"model name\s*: (.*)", _text("/proc/cpuinfo"))
        name, threads = cpu[1] if cpu else platform.processor() or platform.machine(), torch.get_num_threads()
    versions = {"moe_kernels": moe_kernels.__version__, "python": platform.python_version()}
    return versions | {"device": name, "threads": threads}


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:  # not on Linux
        return ""


@dataclass(frozen=True)
class Report:
    """The figures of an evaluation, as report.json has them, and examples of adversarial images.

    Args:
        figures: report.json; docs/evaluation.md says what each of its keys means.
        examples: the first image `x` of each class, `x_adv`, its `label`, and the classes that the model says.
        outcomes: [n] bool for each of "sa", "ra", "aa" (in the full suite) and "verdict": the images that count for it.
    """

    figures: dict[str, Any]
    examples: dict[str, Tensor]
    outcomes: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def finished(cls, folder: str | Path, evaluation: Evaluation, replace: bool = False) -> "Report | None":
        """The report that the very same evaluation has left in a folder, which is then said; None without one.

        Raises:
            UserError: if there is the report of another evaluation, and it is not to be replaced.
        """
        file = Path(folder) / "report.json"
        try:
            before = read_json(file, {}).get("identity")
        except (FileNotFoundError, UserError):  # nothing there, or damaged
            return None
        if isinstance(before, dict) and before.keys() == evaluation.identity.keys():
            what = difference(before, evaluation.identity)
        else:
            what = "that another version made"
        if what and replace:
            return None
        if what:
            if not evaluation.journal.resumed:
                evaluation.journal.finish()
            raise UserError(f"{file} is of an evaluation {what}: give another folder, or remove the file")
        try:
            tensors = (load_tensors(file.with_name(f"{name}.safetensors")) for name in ("examples", "outcomes"))
            report = cls(read_report(file.parent), *tensors)
        except UserError:  # damaged
            return None
        evaluation.journal.finish()
        say(f"evaluated already, with the same weights, images and attacks: remove {file} to measure again")
        return report

    @property
    def sa(self) -> Accuracy:
        """Accuracy on clean images."""
        return self._accuracy("sa")

    @property
    def ra(self) -> Accuracy:
        """Accuracy under PGD with restarts on the whole model."""
        return self._accuracy("ra")

    @property
    def aa(self) -> Accuracy | None:
        """Accuracy under AutoAttack's standard ensemble; None in the quick suite."""
        return None if self.figures["aa"] is None else self._accuracy("aa")

    @property
    def verdict(self) -> Accuracy:
        """The fraction of the images that withstand every attack of the suite."""
        return self._accuracy("verdict")

    def _accuracy(self, name: str) -> Accuracy:
        return Accuracy(self.figures[name], *self.figures["intervals"][name])

    @property
    def attacks(self) -> list[AttackResult]:
        """What each attack did, in the order in which they ran."""
        return [AttackResult(**result) for result in self.figures["attack_results"]]

    @property
    def checks(self) -> dict[str, dict[str, Any]]:
        """The checks of the evaluation itself: by name, whether each has `passed`, and its `value`."""
        return dict(self.figures["checks"])

    def to_json(self) -> str:
        return json.dumps(self.figures, indent=2) + "\n"

    def save(self, folder: str | Path) -> None:
        """Writes report.json, examples.safetensors and outcomes.safetensors into a folder, made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "examples.safetensors", self.examples)
        save_tensors(folder / "outcomes.safetensors", self.outcomes)
        write_atomic(folder / "report.json", self.to_json())

    def __str__(self) -> str:
        figures = self.figures
        lines = [
            f"{figures['method']}: {figures['held_out']} images, {figures['norm']} perturbations of radius "
            f"{distance(figures['eps'])}, {figures['suite']} suite, seed {figures['seed']}",
            "",
            "                                 95 % interval",
            f"clean accuracy        {self.sa}",
            f"under PGD             {self.ra}",
            *([f"under AutoAttack      {self.aa}"] if self.aa else []),
            f"under every attack    {self.verdict}",
            "",
            f"{'attack':34}{'tried on':>9}{'broke':>8}{'new':>6}{'left':>9}{'seconds':>9}",
            *(f"{a.name:34}{a.attacked:9}{a.broken:8}{a.new:6}{a.accuracy:9.2%}{a.seconds:9.1f}" for a in self.attacks),
            "",
            f"routes: {figures['routes']}",
        ]
        failed = {name: check["value"] for name, check in self.checks.items() if not check["passed"]}
        if not failed:
            return "\n".join([*lines, f"checks: {len(self.checks)} of {len(self.checks)} passed"])
        said = (f"  {name}" + ("" if value is None else f": {value:.4g}") for name, value in failed.items())
        return "\n".join(
            [*lines, f"checks that FAILED, of {len(self.checks)} (docs/evaluation.md says what to do):", *said]
        )
