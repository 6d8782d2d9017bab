"""The classifier that is trained and attacked, and views of it for attacks on its parts."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_kernels import RobustMoE, Routing


class Normalize(nn.Module):
    """(x - mean) / std with the mean and std of each channel over the images; std is 1 for a constant channel."""

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
    """Logits [B, C] of images in [0, 1]: a normaliser, a trunk if there is one, then a mixture of experts.

    Args:
        normalize: applied to the images.
        moe: the mixture, applied to the output of the trunk.
        trunk: layers that all experts and the router share; None if there are none.
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
        """The input of the experts and the router."""
        h = self.normalize(x)
        return h if self.trunk is None else self.trunk(h)

    def forward(self, x: Tensor, routing: Routing | Callable[[Tensor], Routing] | None = None) -> Tensor:
        """Logits along the model's own route, a given one, or one that a function computes from the features."""
        h = self.features(x)
        return self.moe(h, routing=routing(h) if callable(routing) else routing)


class DualClassifier(RobustClassifier):
    """F_D = (1 - alpha) F_S + alpha F_R: a robust classifier combined with a standard one.

    Experts and routes are the robust one's; the standard one always routes by itself.

    Args:
        standard: F_S.
        robust: F_R, whose parts this model takes over.
        alpha: weight of F_R, in [0, 1]; may be set at any time.
        mixes: what is mixed, "logits", or "probabilities", in which case the logarithm of the mixture is returned.

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
