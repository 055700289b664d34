"""A depthwise convolution on an identity."""

from torch import Tensor, nn

from backbones import merge

__all__ = ["ResidualConv"]


class ResidualConv(nn.Conv2d):
    """A depthwise 3x3 convolution with bias, added to its input (B, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)

    def merged(self) -> nn.Conv2d:
        """Return the plain convolution that computes the same."""
        plain = nn.Conv2d(
            self.in_channels, self.out_channels, 3, padding=1, groups=self.groups, device="meta"
        )
        plain.weight, plain.bias = self.weight, self.bias
        merge.branches_into_kernel(plain, identity=True)
        return plain.train(self.training)
