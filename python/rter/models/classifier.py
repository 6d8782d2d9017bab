"""The classifier that is trained and attacked, and the views of it that attacks look through."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_kernels import RobustMoE, Routing


class Normalize(nn.Module):
    """(x - mean) / std with the training images' mean and std of each channel, or a std of 1 where that is constant."""

    mean: Tensor  # [C, 1, 1]
    std: Tensor  # [C, 1, 1]

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        std, mean = torch.std_mean(images, dim=(0, 2, 3))
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", torch.where(std > 1e-6, std, 1.0)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class RobustClassifier(nn.Module):
    """Logits of images in [0, 1]: the normaliser, a trunk if there is one, then a top-1 mixture of experts.

    Args:
        normalize: of the images.
        moe: the mixture, on what the trunk makes of them.
        trunk: what the experts share, and the router reads; None for the images themselves.
    """

    def __init__(self, normalize: Normalize, moe: RobustMoE, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.normalize = normalize
        self.moe = moe
        self.trunk = trunk

    @property
    def num_experts(self) -> int:
        return self.moe.num_experts

    def route(self, x: Tensor, top_k: int | None = None) -> Routing:
        return self.moe.route(self.features(x), top_k)

    def features(self, x: Tensor) -> Tensor:
        """What experts and router read."""
        h = self.normalize(x)
        return h if self.trunk is None else self.trunk(h)

    def forward(self, x: Tensor, routing: Routing | Callable[[Tensor], Routing] | None = None) -> Tensor:
        """Along the route of x, along the one given, or along that which a function makes of the features."""
        h = self.features(x)
        return self.moe(h, routing=routing(h) if callable(routing) else routing)


class DualClassifier(RobustClassifier):
    """F_D = (1 - alpha) F_S + alpha F_R: a robust classifier with a standard one beside it.

    Experts and routes are the robust one's; the standard one always routes by itself.

    Args:
        standard: F_S.
        robust: F_R, whose parts this model takes over.
        alpha: weight of F_R, in [0, 1]; may be set at any time.
        mixes: what F_S and F_R are in the sum, "logits" or "probabilities", of which the logarithm is returned.

    Source: Zhang et al., ICML 2025.
    """

    def __init__(
        self, standard: RobustClassifier, robust: RobustClassifier, alpha: float, mixes: str = "logits"
    ) -> None:
        super().__init__(robust.normalize, robust.moe, robust.trunk)
        self.standard = standard
        self.alpha = alpha
        self.mixes = mixes

    @property
    def robust(self) -> RobustClassifier:
        return RobustClassifier(self.normalize, self.moe, self.trunk)

    def mix(self, standard: Tensor, robust: Tensor) -> Tensor:
        if self.mixes == "logits":
            return (1 - self.alpha) * standard + self.alpha * robust
        log_weights = standard.new_tensor((1 - self.alpha, self.alpha)).log()
        return torch.logaddexp(log_weights[0] + standard.log_softmax(-1), log_weights[1] + robust.log_softmax(-1))

    def forward(self, x: Tensor, routing: Routing | Callable[[Tensor], Routing] | None = None) -> Tensor:
        return self.mix(self.standard(x), super().forward(x, routing))


class View(nn.Module):
    """A function of the model's output or route, as a module that an attack can take."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.model, x)
