"""Draws what a forward saves for its backward, by kind: `python benchmarks/plot_saved_bytes.py OUT.svg`."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from saved_bytes import LARGE, Alone
from torch import Tensor, nn

from moe_kernels import ExpertResNet18
from moe_kernels.attacks import attack_mode
from moe_kernels.testing.networks import ResNet18, ViT

matplotlib.use("svg")
from matplotlib import pyplot as plt

RESNET = {
    "results of convolutions": "#4477aa",
    "results of ReLUs": "#ee6677",
    "one bit for each ReLU": "#228833",
    "images, logits and the rest": "#bbbbbb",
}
VIT = {
    "as wide as a token": "#4477aa",
    "queries, keys and values": "#ee6677",
    "as wide as the MLP": "#ccbb44",
    "images, logits and the rest": "#bbbbbb",
}
TOKENS, TOKEN_BYTES = 14 * 14 + 1, 384 * 4


def of_resnet(x: Tensor, images: int) -> str:
    convolutions, relus, bits, rest = RESNET
    if x.dtype == torch.uint8:
        return bits
    if x.ndim != 4 or x.shape[1] == 3:
        return rest
    return relus if (x >= 0).all() else convolutions


def of_vit(x: Tensor, images: int) -> str:
    one, three, four, rest = VIT
    widths = x.untyped_storage().nbytes() / (images * TOKENS * TOKEN_BYTES)
    return {1: one, 3: three, 4: four}.get(widths, rest)  # type: ignore[call-overload]


def bytes_by_kind(net: nn.Module, kind: Callable[[Tensor, int], str], size: int = 32, images: int = 2) -> Counter[str]:
    """Bytes per image of the distinct storages that a forward saves, parameters and buffers excluded."""
    x = torch.rand(images, 3, size, size).requires_grad_()
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
            count[kind(t.detach(), images)] += t.untyped_storage().nbytes() // images
    del result
    return count


def draw(axes: plt.Axes, bars: dict[str, Counter[str]], kinds: dict[str, str], gap: float) -> None:
    left = [0.0] * len(bars)
    for label, colour in kinds.items():
        sizes = [count[label] / 1e6 for count in bars.values()]
        axes.barh(list(bars), sizes, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for y, total in enumerate(left):
        axes.text(total + gap, y, f"{total:.2f}", va="center")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize="small", loc="lower right", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    torch.manual_seed(0)
    grouped = {mode: Alone(ExpertResNet18(1, recompute=mode)) for mode in ("none", "activations", "all")}
    resnets = {"ResNet-18 in torch": bytes_by_kind(ResNet18(), of_resnet)}
    resnets |= {f"ExpertResNet18, recompute={mode!r}": bytes_by_kind(net, of_resnet) for mode, net in grouped.items()}
    for name, net in {"ResNet-18 in attack_mode": ResNet18(), "ExpertResNet18 in attack_mode": grouped["none"]}.items():
        with attack_mode(net):
            resnets[name] = bytes_by_kind(net, of_resnet, images=LARGE)
    vit = ViT().eval()
    vits = {"ViT-S/16 in torch": bytes_by_kind(vit, of_vit, 224)}
    with attack_mode(vit, "activations"):
        vits["ViT-S/16 in attack_mode, recomputing"] = bytes_by_kind(vit, of_vit, 224)
    figure, (above, below) = plt.subplots(2, figsize=(9, 4.6), height_ratios=[6, 3], layout="constrained")
    draw(above, resnets, RESNET, 0.03)
    above.set_xlabel("MB saved for the backward, per 3 x 32 x 32 image in fp32")
    draw(below, vits, VIT, 0.4)
    below.set_xlabel("per 3 x 224 x 224 image")
    figure.savefig(Path(sys.argv[1]), metadata={"Date": None})


if __name__ == "__main__":
    main()
