"""Image data sets in [0, 1]. This list imports none of them, and so no torch."""

from collections.abc import Mapping
from typing import Any

DATASETS = {  # where each one's load(folder, image_size) is; size 0 leaves images in separate files unchanged
    "digits": "rter.data.digits:load",
    "cifar10": "rter.data.cifar10:load",
    "svhn": "rter.data.svhn:load",
    "tiny-imagenet": "rter.data.folders:load_tiny_imagenet",
    "image-folder": "rter.data.folders:load_image_folder",
}
# Defaults of a data set, which take precedence over a method's; a data set without any has those of the digits.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cifar10": {
        "model": "resnet18",
        "eps": 8 / 255,
        "augment": "flip,translate4",
        "held_out": 500,
        "eval_every": 1,
        "epochs": 30,
        "explore": 0.5,
        "optimizer": "sgd",
        "batch_size": 128,
        "lr": 0.2,
        "schedule": "one-cycle",
        "weight_decay": 5e-4,
        "ema": 0.999,
    },
}
