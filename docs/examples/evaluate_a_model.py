"""Your own model under every attack of the suite: `python docs/examples/evaluate_a_model.py`.

The same evaluation on the command line takes a file with a function that returns the model:

    rter evaluate --model docs/examples/evaluate_a_model.py:network --weights cnn.pt --data digits --eps 0.2 --out DIR
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
