"""Your own model under every attack of the suite: `python docs/examples/evaluate_a_model.py`.

It writes cnn.pt and report/ into the current folder. The command line takes a file with a function that returns the
model:

    rter evaluate --model docs/examples/evaluate_a_model.py:network --weights cnn.pt --data digits --eps 0.2 --out DIR

It measures on all of the digits, which have no test split, and so also on those that this model was trained on: its
figures are too good. Give data with a test split, or call `evaluate_model` with images of your own, as here.
"""

from pathlib import Path

import adversarial_training
import torch
from rter import Report, evaluate_model
from torch import nn


def network() -> nn.Module:
    return adversarial_training.CNN()


def main(folder: Path, epochs: int = 20, test_images: int = 360, steps: int = 50, suite: str = "full") -> Report:
    model = adversarial_training.main(epochs, test_images)
    torch.save(model.state_dict(), folder / "cnn.pt")
    _, _, x, y = adversarial_training.digits()
    x, y = x[:test_images], y[:test_images]
    report = evaluate_model(model, x, y, eps=adversarial_training.EPS, suite=suite, steps=steps, out=folder / "report")
    print(report)
    return report


if __name__ == "__main__":
    main(Path())
