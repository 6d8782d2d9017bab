"""The networks that serve as experts, each as one grouped network."""

from torch import Tensor, nn

from moe_kernels import ExpertConv2d, ExpertLinear
from moe_kernels.ops import mask_relu


class ExpertConvNet(nn.Module):
    """All experts as one grouped network: two convolutions, the second of stride 2, and two linear layers."""

    def __init__(self, num_experts: int, image: tuple[int, int, int], num_classes: int, width: int) -> None:
        super().__init__()
        C, H, W = image
        features = 2 * width * ((H + 1) // 2) * ((W + 1) // 2)
        self.num_experts = num_experts
        self.conv1 = ExpertConv2d(num_experts, C, width, 3, padding=1)
        self.conv2 = ExpertConv2d(num_experts, width, 2 * width, 3, stride=2, padding=1)
        self.hidden = ExpertLinear(num_experts, features, 4 * width)
        self.head = ExpertLinear(num_experts, 4 * width, num_classes)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        x = mask_relu(self.conv1(x, offsets))
        x = mask_relu(self.conv2(x, offsets))
        x = mask_relu(self.hidden(x.flatten(1), offsets))
        return self.head(x, offsets)
