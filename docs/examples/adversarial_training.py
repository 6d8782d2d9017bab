"""Adversarial training of a CNN in plain PyTorch: `python docs/examples/adversarial_training.py`.

Each batch is replaced by its attacked images (Madry et al. 2018). The attack needs no change to the model, and leaves
it in training mode, with its gradients and running statistics untouched.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from moe_kernels import PGD

EPS = 0.2  # in units of the images, which are in [0, 1]


class CNN(nn.Sequential):
    def __init__(self, width: int = 16) -> None:
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 16, 10),
        )


def digits(held_out: int = 360) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [n, 1, 8, 8] in [0, 1] and their classes, to train on and to test on."""
    data = load_digits()
    shuffled = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.images, dtype=torch.float32)[shuffled, None] / 16
    y = torch.tensor(data.target)[shuffled]
    return x[held_out:], y[held_out:], x[:held_out], y[:held_out]


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, batch: int = 128) -> None:
    attack = PGD(model, eps=EPS, alpha=EPS / 4, steps=10, seed=0)
    optimizer = torch.optim.AdamW(model.parameters())
    steps = epochs * -(-len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch):
            loss = F.cross_entropy(model(attack(x[rows], y[rows])), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def main(epochs: int = 20, test_images: int = 360) -> nn.Module:
    torch.manual_seed(0)
    x, y, x_test, y_test = digits()
    x_test, y_test = x_test[:test_images], y_test[:test_images]
    model = CNN()
    train(model, x, y, epochs)
    model.eval()
    strong = PGD(model, eps=EPS, alpha=EPS / 4, steps=50, restarts=5, seed=1)
    print(f"clean accuracy   {accuracy(model, x_test, y_test):.1%}")
    print(f"under PGD-50     {accuracy(model, strong(x_test, y_test), y_test):.1%}")
    return model


if __name__ == "__main__":
    main()
