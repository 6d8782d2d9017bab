"""The first stages of a network, before the router, which all experts of a mixture share."""

import torch
from torch import Tensor

from moe_kernels.nn.resnet import ResNet18Stages, check_stages


class ResNet18Trunk(ResNet18Stages):
    """The stem and the first stages of a CIFAR ResNet-18, which all experts of a mixture share.

        h = trunk(x);  routing = moe.route(h);  logits = moe(h, routing=routing)

    with moe = RobustMoE.from_experts(ExpertResNet18(E, shared_stages=trunk.shared_stages), router). The state's tensors
    are the plain network's with a leading dimension [1], and `state_dicts()[0]` is a part of the plain state dict.

    Args:
        shared_stages: number of stages, 1 to 4.
        in_channels: channels of the images.
        width: channels of the first stage.
        device, dtype: those of the parameters.
        recompute, num_kernels: as for `ExpertResNet18`.

    Raises:
        ValueError: if shared_stages or recompute is out of range.
    """

    def __init__(
        self,
        shared_stages: int = 1,
        in_channels: int = 3,
        width: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: str = "activations",
        num_kernels: int = 1,
    ) -> None:
        check_stages(shared_stages, 1)
        super().__init__(1, in_channels, width, 1, shared_stages, recompute, num_kernels, device=device, dtype=dtype)
        self.shared_stages = shared_stages

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x [N, C, H, W] -> [N, width 2^(S - 1), H / 2^(S - 1), W / 2^(S - 1)] with S = shared_stages."""
        return super().forward(x, len(x) * torch.arange(2, dtype=torch.int32, device=x.device))

    def logits(self, x: Tensor, offsets: Tensor) -> Tensor:
        return self.features(x, offsets)
