"""The metrics of a run for TensorBoard, if it is installed."""

from pathlib import Path
from typing import Any

from rter.errors import UserError


class Board:
    """Writes into the folder `tensorboard` of a run. Raises UserError if the package is not installed."""

    def __init__(self, out: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs a package: pip install tensorboard") from None
        self.make_writer = lambda epoch: SummaryWriter(str(out / "tensorboard"), purge_step=epoch)
        self.writer: Any = None

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds an epoch's metrics, and hides what an earlier process wrote for this epoch or later ones."""
        epoch = metrics["epoch"]
        self.writer = self.writer or self.make_writer(epoch)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()
