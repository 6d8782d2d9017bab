"""The whole model of a run: a mixture of experts behind a router, for images in [0, 1]."""

import os

import torch
from torch import Tensor

from moe_kernels import RobustMoE
from rter.config import Config
from rter.data.split import Data
from rter.errors import UserError
from rter.models.classifier import DualClassifier, Normalize, RobustClassifier
from rter.models.networks import make_experts, make_trunk
from rter.models.routers import make_router
from rter.notation import parse_normalize

STATISTICS = 10_000  # training images over which the normaliser's mean and deviation are taken


def build_model(config: Config, data: Data) -> RobustClassifier:
    """The model before training; the global random state is not changed.

    Raises:
        UserError: if the settings do not fit the images, or the model does not fit the memory.
    """
    _demand_memory(config, data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed_for("init"))
        robust = _classifier(config, data)
        if not config.dual:
            return robust
        return DualClassifier(_classifier(config, data), robust, config.dual_alpha, config.dual_mix)


def _demand_memory(config: Config, data: Data) -> None:
    """Refuses a model that is bound to fail, since its weights alone, in fp32, exceed the machine's memory."""
    image = data.train.pixels.shape[1:]
    try:
        with torch.device("meta"):
            trunk, features = make_trunk(config, image)
            parts = trunk, make_experts(config, image, data.num_classes), make_router(config, features)
        needed = (1 + config.dual) * 4 * sum(w.numel() for part in parts if part for w in part.parameters())
    except RuntimeError:  # more elements than fit an int64
        needed = 2**63
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"num_experts, width and depth must give a model that fits the memory of {there / 1e9:.0f} GB, got "
            f"{config.num_experts} experts of width {config.width}, whose weights take {needed / 1e9:.3g} GB"
        )


def _classifier(config: Config, data: Data) -> RobustClassifier:
    image = data.train.pixels.shape[1:]
    experts = make_experts(config, image, data.num_classes)
    trunk, features = make_trunk(config, image)
    router = make_router(config, features)
    top_k = config.num_experts if config.gate == "soft" else 1
    moe = RobustMoE.from_experts(experts, router, top_k, config.gate)
    return RobustClassifier(_normalize(config, data.train[:STATISTICS].x), moe, trunk)


def _normalize(config: Config, images: Tensor) -> Normalize:
    """The normaliser, by the images' mean and deviation or those that the setting gives."""
    normalize = Normalize(images)
    if config.normalize != "data":
        C = images.shape[1]
        values = parse_normalize(config.normalize)
        if any(len(part) not in (1, C) for part in values):
            raise UserError(f"normalize must give one number or {C}, one per channel, got {config.normalize!r}")
        for buffer, part in zip((normalize.mean, normalize.std), values, strict=True):
            buffer.copy_(torch.tensor(part)[:, None, None])
    return normalize
