"""Draws where the bytes go that a forward of ResNet-18 saves: `python benchmarks/plot_saved_bytes.py OUT.svg`."""

import sys
from collections import Counter
from pathlib import Path

import matplotlib
import torch
from saved_bytes import Alone
from torch import Tensor, nn

from moe_kernels import ExpertResNet18
from moe_kernels.attacks import attack_mode
from moe_kernels.testing.networks import ResNet18

matplotlib.use("svg")
from matplotlib import pyplot as plt

KINDS = {
    "results of convolutions": "#4477aa",
    "results of ReLUs": "#ee6677",
    "one bit for each ReLU": "#228833",
    "images, logits and the rest": "#bbbbbb",
}


def kind(x: Tensor) -> str:
    convolutions, relus, bits, rest = KINDS
    if x.dtype == torch.uint8:
        return bits
    if x.ndim != 4 or x.shape[1] == 3:
        return rest
    return relus if (x >= 0).all() else convolutions


def bytes_by_kind(net: nn.Module, images: int = 2) -> Counter[str]:
    """Bytes per image of the distinct storages that a forward saves, parameters and buffers excluded."""
    x = torch.rand(images, 3, 32, 32).requires_grad_()
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = net(x)
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    count: Counter[str] = Counter()
    for address, t in saved.items():
        if address not in own:
            count[kind(t.detach())] += t.untyped_storage().nbytes() // images
    del result
    return count


def main() -> None:
    torch.manual_seed(0)
    grouped = {mode: Alone(ExpertResNet18(1, recompute=mode)) for mode in ("none", "activations", "all")}
    bars = {"torch, training": bytes_by_kind(ResNet18())}
    bars |= {f"ExpertResNet18, recompute={mode!r}": bytes_by_kind(net) for mode, net in grouped.items()}
    for name, net in {"torch's in attack_mode": ResNet18(), "ExpertResNet18 in attack_mode": grouped["none"]}.items():
        with attack_mode(net):
            bars[name] = bytes_by_kind(net)
    figure, axes = plt.subplots(figsize=(9, 3), layout="constrained")
    left = [0.0] * len(bars)
    for label, colour in KINDS.items():
        sizes = [count[label] / 1e6 for count in bars.values()]
        axes.barh(list(bars), sizes, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for y, total in enumerate(left):
        axes.text(total + 0.03, y, f"{total:.2f}", va="center")
    axes.invert_yaxis()
    axes.set_xlabel("MB saved for the backward, per 3 x 32 x 32 image in fp32")
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(sys.argv[1]), metadata={"Date": None})


if __name__ == "__main__":
    main()
