"""Large-small convolution: 3x3 kernels for every position, predicted from what a 7x7 kernel sees.

Source: LSNet (arXiv 2503.23135), section 3.3.
"""

from torch import Tensor, nn

from backbones import merge
from backbones.layers import conv_norm, fx_leaf
from backbones.ops import small_kernel_aggregation

__all__ = ["LargeKernelPerception", "LargeSmallConv"]

SHARING = 8  # channels that share a predicted kernel

aggregate = fx_leaf(small_kernel_aggregation)


class LargeKernelPerception(nn.Module):
    """Predict 3x3 kernels for every position: (B, C, H, W) to (B, C/8, 9, H, W).

    The norm takes its statistics over the taps and all positions of an image.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        half, groups = dim // 2, dim // SHARING
        self.reduce = conv_norm(dim, half, 1, act=nn.ReLU())
        self.conv_dw = conv_norm(half, half, 7, groups=half)
        self.mix = conv_norm(half, half, 1, act=nn.ReLU())
        self.predict = nn.Conv2d(half, 9 * groups, 1)
        self.norm = nn.GroupNorm(groups, 9 * groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.conv_dw(self.reduce(x)))  # B C/2 H W
        x = self.norm(self.predict(x))  # B 9*C/8 H W
        return x.unflatten(1, (-1, 9))  # B C/8 K H W

    def reparameterize(self) -> None:
        merge.fold_chain(self, ("reduce", "conv_dw", "mix"))


class LargeSmallConv(nn.Module):
    """``x + norm(aggregate(x, kernels))``: large-small convolution (equations 4 to 6)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lkp = LargeKernelPerception(dim)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(aggregate(x, self.lkp(x))) + x
