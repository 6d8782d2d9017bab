"""An evaluation: a model, images, the strength of the attacks, and what these have found."""

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rter.attack import make_attack
from rter.console import Progress
from rter.data.split import Split
from rter.journal import Found, Journal, seeded
from rter.strength import BATCH, Strength

Find = Callable[[Tensor, Tensor], Tensor]  # x [B, C, H, W], y [B] -> x_adv
Judge = Callable[[Tensor, Tensor], Found]  # x_adv [B, C, H, W], its rows [B] -> what to keep of each


@dataclass(frozen=True)
class AttackResult:
    """What one attack did.

    Args:
        name: of the attack.
        attacked: how many images it was tried on.
        broken: how many of them it broke.
        new: how many of these no earlier attack had broken.
        accuracy: the fraction of all images that it leaves standing: among those classified correctly for an attack
            with a figure of its own, otherwise among those that stood before it.
        seconds: how long all of its parts took.
    """

    name: str
    attacked: int
    broken: int
    new: int
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class Attacked:
    """What PGD did to a model or a part of it.

    Args:
        tried: [n] bool, the images that were attacked.
        robust: [n] bool, those of them that the target still classifies as y.
        judged: what the judge keeps of the images that were found, [n, ...] by name; zero for images not attacked.
    """

    tried: Tensor
    robust: Tensor
    judged: dict[str, Tensor]


class Evaluation:
    """Attacks a model, and tallies which images withstand everything so far.

    Every attack runs batch by batch, and every batch of every restart is kept in the journal. An image that is
    misclassified without an attack, or has been broken, is not attacked again, except by attacks that give a figure of
    their own, on the whole model or on a part of it: these are tried on all images that their target classifies
    correctly.

    Args:
        model: in eval mode; with experts if its attribute `num_experts` is above 0, and then with `route(x)` and
            `forward(x, routing=None)`.
        images: images in [0, 1] and labels.
        file: where finished parts are kept, so that an evaluation that was killed can resume; None keeps nothing.
        progress: show how far each attack is: a bar at a terminal, elsewhere a line every 30 s.

    Attributes:
        clean: [n] bool, images that the model classifies correctly.
        standing: [n] bool, those among them that no attack has broken so far.
        results: what each attack so far did.
        outcomes: [n] bool by the name of a figure that `rter.evaluate.measure` has found: the images that count for it.
    """

    def __init__(
        self, model: nn.Module, images: Split, strength: Strength, file: Path | None = None, progress: bool = False
    ) -> None:
        self.model, self.strength, self.progress = model, strength, progress
        self.x, self.y = images.x, images.y
        self.num_experts = int(model.num_experts)  # type: ignore[arg-type]
        self.journal = Journal(file, self.identity if file else {}, strength.seed, self.x.device)
        self.results: list[AttackResult] = []
        self.outcomes: dict[str, Tensor] = {}

    @functools.cached_property
    def clean(self) -> Tensor:
        said = self.of_each("clean", self.everything, lambda part: {"class": predict(self.model, self.x[part])})
        return said["class"] == self.y

    @functools.cached_property
    def standing(self) -> Tensor:
        return self.clean.clone()

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What is evaluated, and how: hashes of the model and the images, the strength, torch's version."""
        weights = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            if isinstance(value, Tensor):
                weights.update(f"{name} {value.dtype} {list(value.shape)}".encode())
                weights.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        with seeded(self.strength.seed, self.x.device):  # in case the model is random
            weights.update(predict(self.model, self.x[:64]).cpu().numpy().tobytes())
        hashes = {"images": self.images_hash(), "model": weights.hexdigest()}
        return hashes | asdict(self.strength) | {"torch": torch.__version__}

    def images_hash(self) -> str:
        """A hash of the images and their labels, in their order."""
        images = hashlib.sha256()
        for tensor in (self.x, self.y):
            images.update(f"{tensor.dtype} {list(tensor.shape)}".encode() + tensor.cpu().contiguous().numpy().tobytes())
        return images.hexdigest()

    @property
    def everything(self) -> Tensor:
        """All rows."""
        return torch.arange(len(self.y), device=self.y.device)

    @property
    def images(self) -> Split:
        return Split(self.x, self.y)

    @property
    def several(self) -> bool:
        """Whether there is a route to attack."""
        return self.num_experts > 1

    def batches(self, name: str, rows: Tensor, compute: Callable[[Tensor], Found]) -> Iterator[tuple[Tensor, Found]]:
        """For each batch of the rows what it computes; `name` and the number of the batch name the part."""
        parts = rows.split(self.strength.batch_size) if len(rows) else ()
        with Progress(name, len(rows), "image", shown=self.progress) as bar:
            for i, part in enumerate(parts):
                found = self.journal.part(f"{name}/{i}", lambda part=part: compute(part))  # type: ignore[misc]
                yield part, {key: v.to(self.x.device) if isinstance(v, Tensor) else v for key, v in found.items()}
                bar.update(len(part))

    def of_each(self, name: str, rows: Tensor, compute: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What is computed for each of the rows, [n, ...] by name; zero for other rows."""
        result: dict[str, Tensor] = {}
        for part, found in self.batches(name, rows, compute):
            _put(result, part, found, len(self.y))
        return result

    def pgd(
        self,
        target: nn.Module,
        name: str,
        *,
        eps: float | None = None,
        steps: int | None = None,
        restarts: int = 1,
        y: Tensor | None = None,
        among: Tensor | None = None,
        judge: Judge | None = None,
    ) -> Attacked:
        """PGD on a model or a part of it; later restarts only attack the images that have withstood so far.

        Args:
            eps, steps: if None, those of the strength.
            y: labels [n] for the target; if None, the images' own.
            among: [n] bool, images to attack; if None, those that the target classifies correctly.
            judge: what else to keep about the images that are found.
        """
        y = self.y if y is None else y
        eps, steps = self.strength.eps if eps is None else eps, self.strength.steps if steps is None else steps
        if among is None:
            right = self.of_each(f"{name}/clean", self.everything, lambda p: {"right": says(target, self.x[p], y[p])})
            among = right["right"]
        robust, judged = among.clone(), dict[str, Tensor]()
        for restart in range(restarts):

            def attacked(part: Tensor, restart: int = restart) -> Found:
                pgd = make_attack(target, self.strength, eps, steps, name, restart, int(part[0]))
                x_adv = pgd(self.x[part], y[part])
                return {"robust": says(target, x_adv, y[part]), **(judge(x_adv, part) if judge else {})}

            for part, found in self.batches(f"{name}/{restart}", robust.nonzero()[:, 0], attacked):
                robust[part] = found.pop("robust")
                _put(judged, part, found, len(y))
        return Attacked(among, robust, judged)

    def find(self, name: str, find: Find) -> None:
        """Tries an attack on the images that still stand."""

        def compute(part: Tensor) -> dict[str, Tensor]:
            return {"right": says(self.model, find(self.x[part], self.y[part]), self.y[part])}

        tried = self.standing.clone()
        right = self.of_each(name, tried.nonzero()[:, 0], compute).get("right", tried)
        self.record(name, tried, right, among=tried)

    def record(
        self, name: str, tried: Tensor, right: Tensor, *, among: Tensor | None = None, parts: str | None = None
    ) -> None:
        """Tallies an attack.

        Args:
            name: of the attack.
            tried: [n] bool, the images that it was tried on.
            right: [n] bool, for these images, whether the model classifies what was found correctly.
            among: [n] bool, the images among which those left standing are counted; if None, those classified
                correctly without an attack.
            parts: the prefix of the attack's parts in the journal, if not its name.
        """
        tried = tried & self.clean
        broken, before = tried & ~right, self.standing
        self.standing = before & ~broken
        self.results.append(
            AttackResult(
                name,
                int(tried.sum()),
                int(broken.sum()),
                int((before & broken).sum()),
                mean((self.clean if among is None else among) & ~broken),
                round(self.journal.seconds(f"{name}/" if parts is None else parts), 3),
            )
        )


def _put(result: dict[str, Tensor], part: Tensor, found: Found, rows: int) -> None:
    for key, value in found.items():
        if key not in result:
            result[key] = value.new_zeros(rows, *value.shape[1:])
        result[key][part] = value


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(BATCH)]).argmax(-1)


def says(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """[n] bool: whether the model says y."""
    return predict(model, x) == y


def mean(flags: Tensor) -> float:
    return flags.double().mean().item()


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Puts the model in eval mode; on exit, every module is in its own mode again."""
    before = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training
