"""The least time each kernel can take on an H200: `python benchmarks/roofline.py > docs/roofline.md`.

floor = max(bytes / copy bandwidth, flops / matrix rate); every input read once, every output written once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

COPY = 4.3e12  # bytes/s, reads plus writes, of a large device-to-device copy on an H200
MATRIX = 790e12  # flop/s of a bf16 product of random 8192 x 8192 matrices there


@dataclass(frozen=True)
class Work:
    """What one call must move and compute; matrix products have bf16 operands."""

    kernel: str
    shape: str
    bytes: int
    flops: int = 0
    launches: int = 1

    @property
    def floor(self) -> float:
        """Seconds."""
        return max(self.bytes / COPY, self.flops / MATRIX)

    @property
    def bound(self) -> str:
        return "arithmetic" if self.flops / MATRIX > self.bytes / COPY else "memory"


class Linear(NamedTuple):
    """Rows sorted over the experts: [rows, k] times [experts, n, k]."""

    rows: int
    k: int
    n: int
    experts: int

    def __str__(self) -> str:
        return f"{self.experts} x {self.rows // self.experts} rows, k {self.k}, n {self.n}"


class Layer(NamedTuple):
    """A gated MLP layer: tokens of width d through top_k of the experts, each of width n."""

    tokens: int
    d: int
    n: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens, d {self.d}, n {self.n}, {self.experts} experts, top {self.top_k}"


class Conv(NamedTuple):
    """A convolution of images [c_in, size, size] with padding kernel // 2."""

    images: int
    experts: int
    c_in: int
    c_out: int
    size: int
    kernel: int = 3
    stride: int = 1

    def __str__(self) -> str:
        shape = f"{self.kernel}x{self.kernel} {self.c_in} to {self.c_out} at {self.size}x{self.size}"
        return f"{self.images} images, {self.experts} experts, {shape}" + (f" by {self.stride}" * (self.stride > 1))


class Shapes(NamedTuple):
    """What is measured and modelled."""

    linear: tuple[Linear, ...]
    layer: Layer
    conv: tuple[Conv, ...]
    images: tuple[int, int, int, int]  # of the PGD step
    activations: tuple[int, int, int, int]  # of the ReLU and the batch norm of an attack
    logits: tuple[int, int]  # of the KL divergence
    rt_er: tuple[int, int, int]  # images, experts, width of the ResNet-18


# Shapes for which others publish times of grouped GEMMs and MoE layers, and RT-ER on CIFAR-10 at a batch of 512.
TARGETS = Shapes(
    linear=(Linear(16 * 2048, 2048, 768, 16), Linear(8 * 4096, 2048, 768, 8), Linear(64 * 512, 2048, 768, 64)),
    layer=Layer(32768, 2048, 768, 128, 8),
    conv=(Conv(1024, 4, 64, 64, 32), Conv(1024, 4, 128, 256, 16, stride=2), Conv(1024, 4, 512, 512, 4)),
    images=(16384, 3, 32, 32),
    activations=(1024, 64, 32, 32),
    logits=(16384, 200),
    rt_er=(512, 4, 64),
)


def linear(shape: Linear) -> dict[str, Work]:
    """Forward and the gradients, in bf16; the first three move and compute the same."""
    rows, k, n, experts = shape
    moved, flops = 2 * (rows * k + experts * n * k + rows * n), 2 * rows * n * k
    works = {part: Work(f"expert_linear {part}", str(shape), moved, flops) for part in ("forward", "dX", "dW")}
    return works | {"dbias": Work("expert_sum of dY, the bias gradient", str(shape), 2 * (rows + experts) * n, 0, 2)}


def conv(shape: Conv) -> dict[str, Work]:
    """Forward, input gradient and weight gradient, in bf16; the weight gradient may sum partial results."""
    images, experts, c_in, c_out, size, kernel, stride = shape
    weight, positions = experts * c_out * c_in * kernel**2, images * (size // stride) ** 2
    moved = 2 * (images * c_in * size**2 + weight + positions * c_out)
    flops = 2 * positions * c_out * c_in * kernel**2
    return {
        part: Work(f"expert_conv2d {part}", str(shape), moved, flops, launches)
        for part, launches in (("forward", 1), ("dX", 1), ("dW", 3))
    }


def routing(shape: Layer) -> dict[str, Work]:
    """The operators around the experts, on fp32 logits and bf16 rows."""
    tokens, d, _, experts, k = shape
    slots, logits = tokens * k, 4 * tokens * experts
    return {
        "topk_route": Work("topk_route", str(shape), logits + 8 * slots),
        "topk_route backward": Work("topk_route backward", str(shape), 2 * logits + 8 * slots),
        "group_by_expert": Work("group_by_expert", str(shape), 12 * slots + 4 * experts, launches=3),
        "combine": Work("combine", str(shape), 2 * (slots + tokens) * d + 8 * slots),
        "combine dY": Work("combine dY", str(shape), 2 * (slots + tokens) * d + 8 * slots),
        "index_sum": Work("index_sum of dX over slots", str(shape), 2 * (slots + tokens) * d + 4 * slots, 0, 8),
    }


def layer(shape: Layer) -> dict[str, Work]:
    """The whole layer in bf16; hidden activations are written once and read once.

    Forward: router, route, sort (3), up, down, combine. Backward: dO W2, the hidden gradient, dW2, dW1, dX, its sum
    over each token's slots (8), the routing's gradient, the router's two and their sum with dX.
    """
    tokens, d, n, experts, k = shape
    slots, weights = tokens * k, 3 * experts * n * d
    flops = 6 * slots * n * d
    hidden = slots * 2 * n
    forward = 2 * (2 * tokens * d + weights + 2 * hidden)
    backward = 2 * (3 * tokens * d + 2 * weights + 4 * hidden)
    return {
        "forward": Work("RobustMoE forward", str(shape), forward, flops, 8),
        "hidden gradient": Work("expert_mlp_hidden_grad", str(shape), 12 * slots * n + 8 * slots),
        "backward": Work("RobustMoE backward", str(shape), backward, 2 * flops, 17),
    }


def elementwise(shapes: Shapes) -> dict[str, Work]:
    """The passes over images and activations."""
    pixels, values, classes = (_product(s) for s in (shapes.images, shapes.activations, shapes.logits))
    images, activations, logits = (" x ".join(map(str, s)) for s in (shapes.images, shapes.activations, shapes.logits))
    return {
        "pgd_step_": Work("pgd_step_ Linf, fp32", images, 16 * pixels),
        "mask_relu forward": Work("mask_relu forward, bf16", activations, 4 * values + values // 8),
        "mask_relu backward": Work("mask_relu backward, bf16", activations, 4 * values + values // 8),
        "expert_batch_norm forward": Work("expert_batch_norm training forward, bf16", activations, 6 * values, 0, 3),
        "expert_batch_norm eval": Work("expert_batch_norm eval forward, bf16", activations, 4 * values, 0, 2),
        "expert_batch_norm backward": Work("expert_batch_norm training backward, bf16", activations, 10 * values, 0, 4),
        "kl_divergence": Work("kl_divergence, fp32", logits, 8 * classes),
        "kl_divergence backward": Work("kl_divergence backward, fp32", logits, 16 * classes),
    }


def _product(sizes: tuple[int, ...]) -> int:
    return sizes[0] * _product(sizes[1:]) if sizes else 1


def resnet18(images: int, experts: int, width: int, size: int = 32) -> Iterator[Conv]:
    """The convolutions of a CIFAR ResNet-18."""
    yield Conv(images, experts, 3, width, size)
    c_in = width
    for stage in range(4):
        c_out, stride = width << stage, 1 if stage == 0 else 2
        yield Conv(images, experts, c_in, c_out, size, 3, stride)
        if stride > 1:
            yield Conv(images, experts, c_in, c_out, size, 1, stride)
        size, c_in = size // stride, c_out
        for _ in range(3):
            yield Conv(images, experts, c_out, c_out, size)


def rt_er(shape: tuple[int, int, int], steps: int = 10) -> dict[str, Work]:
    """One training step: both attacks as 2 B images, forward and input gradient, then 3 B images trained.

    Counts the convolutions alone: norms and ReLUs could be fused into them, so their bytes do not belong to the floor.
    """
    batch, experts, width = shape
    name = f"{batch} images, {experts} x ResNet-18 of width {width}, PGD-{steps} twice"
    attack = [conv(layer)[part] for layer in resnet18(2 * batch, experts, width) for part in ("forward", "dX")]
    train = [work for layer in resnet18(3 * batch, experts, width) for work in conv(layer).values()]
    moved, flops, launches = (
        steps * sum(getattr(w, what) for w in attack) + sum(getattr(w, what) for w in train)
        for what in ("bytes", "flops", "launches")
    )
    return {"step": Work("RT-ER step", name, moved, flops, launches)}


def attack(shape: tuple[int, int, int], steps: int) -> dict[str, Work]:
    """One step, and all steps, of both RT-ER attacks as one batch: the convolutions' forward and input gradient."""
    batch, experts, width = shape
    name = f"{2 * batch} images, {experts} x ResNet-18 of width {width}"
    layers = [conv(layer)[part] for layer in resnet18(2 * batch, experts, width) for part in ("forward", "dX")]
    moved, flops, launches = (sum(getattr(w, what) for w in layers) for what in ("bytes", "flops", "launches"))
    return {
        "step": Work("attack step", name, moved, flops, launches),
        "eager": Work(f"PGD-{steps}, step by step", name, steps * moved, steps * flops, steps * launches),
        "captured": Work(f"PGD-{steps}, captured", name, steps * moved, steps * flops, steps * launches),
    }


def every(shapes: Shapes) -> Iterator[Work]:
    for gemm in shapes.linear:
        yield from linear(gemm).values()
    yield from layer(shapes.layer).values()
    yield from routing(shapes.layer).values()
    for convolution in shapes.conv:
        yield from conv(convolution).values()
    yield from elementwise(shapes).values()
    yield from rt_er(shapes.rt_er).values()


PREAMBLE = f"""\
# The floor under each kernel

Bytes that must move over {COPY / 1e12:.1f} TB/s, and operations over {MATRIX / 1e12:.0f} TFLOP/s: the copy bandwidth
and the bf16 matrix rate that PyTorch reaches on one H200. The larger of the two times is the floor; what a kernel
takes, over it, is the gap. Computed by `python benchmarks/roofline.py`, not measured: `make gpu` prints measured times
beside it.

| kernel | shape | MB | GFLOP | launches | bound by | floor, us |
|---|---|--:|--:|--:|---|--:|"""


def table(shapes: Shapes) -> str:
    lines = [PREAMBLE]
    for w in every(shapes):
        lines.append(
            f"| {w.kernel} | {w.shape} | {w.bytes / 1e6:.1f} | {w.flops / 1e9:.1f} | {w.launches} | {w.bound} | "
            f"{w.floor * 1e6:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(TARGETS))
