"""Whether a network of ExpertCondConv2d uses a kernel of its own for each image; run it with python/ on the PYTHONPATH:

python benchmarks/condconv_coefficients.py RUN --data-dir data

RUN was trained by `rter train --kernels K`. Prints how much the coefficients vary over test images, and how much the
attack moves them; then the accuracies of the network as it is, and with the coefficients of every image replaced by
their means over clean images, one kernel for all.
"""

import argparse
from pathlib import Path

import torch
from rter.evaluate import TrainedRun
from torch import Tensor, nn

from moe_kernels import PGD, ExpertCondConv2d


class Fixed(nn.Module):
    """A router whose coefficients are the same for every image."""

    def __init__(self, coefficients: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", coefficients.logit())

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


@torch.no_grad()
def coefficients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of each layer, [N, K]."""
    found: dict[str, Tensor] = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, ExpertCondConv2d)}
    hooks = [
        layer.router.register_forward_hook(lambda _, __, logits, name=name: found.update({name: logits.sigmoid()}))
        for name, layer in layers.items()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data-dir")
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    config, data, model = TrainedRun(options.run, data_dir=options.data_dir).load()
    if model.num_experts > 1:
        raise SystemExit(f"RUN must have one expert, whose images keep their order, got {model.num_experts}")
    test = data.test.sample(options.images, config.seed)

    def attack(x: Tensor, y: Tensor) -> Tensor:
        return PGD(model, config.eps, config.eps / 4, 20, norm=config.norm, seed=0)(x, y)

    adversarial = attack(test.x, test.y)
    clean, attacked = coefficients(model, test.x), coefficients(model, adversarial)
    print("layer: mean of the coefficients, their deviation over images, root mean square of what the attack adds")
    for name, c in clean.items():
        numbers = c.mean().item(), c.std(0).mean().item(), (attacked[name] - c).square().mean().sqrt().item()
        print(f"{name}: {', '.join(f'{number:.3f}' for number in numbers)}")
    print(f"as trained: clean {accuracy(model, test.x, test.y):.3f}, PGD-20 {accuracy(model, adversarial, test.y):.3f}")
    for name, c in clean.items():
        model.get_submodule(name).router = Fixed(c.mean(0))
    fixed = accuracy(model, attack(test.x, test.y), test.y)
    print(f"one kernel for all images: clean {accuracy(model, test.x, test.y):.3f}, PGD-20 {fixed:.3f}")


if __name__ == "__main__":
    main()
