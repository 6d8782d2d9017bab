"""Models: a mixture of experts behind a router. These lists import none of the parts, and so no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Network:
    """A network that serves as an expert.

    Args:
        build: where the function (config, image [C, H, W], num_classes) -> experts is.
        defaults: settings for which the network has a default of its own.
    """

    build: str
    defaults: Mapping[str, int] = field(default_factory=dict)


NETWORKS = {
    "small-conv": Network("rter.models.networks:small_conv"),
    "resnet18": Network("rter.models.networks:resnet18", {"width": 64}),
    "preact-resnet18": Network("rter.models.networks:preact_resnet18", {"width": 64}),
    "wrn": Network("rter.models.networks:wrn", {"width": 160, "depth": 28}),
    "vit": Network("rter.models.networks:vit", {"width": 384, "depth": 12}),
}
ROUTERS = {  # where each one's function (image [C, H, W], num_experts) -> router is
    "linear": "rter.models.routers:linear",
    "conv": "rter.models.routers:conv",
    "mlp": "rter.models.routers:mlp",
    "pooled": "rter.models.routers:pooled",
}
