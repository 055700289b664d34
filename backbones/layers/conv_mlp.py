"""A channel mixer that also looks at the neighbors."""

from __future__ import annotations

from torch import Tensor, nn

from backbones.layers.mlp import ChannelMlp

__all__ = ["ConvMlp", "ResidualConv"]


class ResidualConv(nn.Conv2d):
    """A depthwise 3x3 convolution with bias, added to its input (B, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ConvMlp(ChannelMlp):
    """``fc2(GRN(conv_dw(GELU(fc1(x)))))`` on (B, C, H, W), `conv_dw` a residual convolution.

    Source: OverLoCK (arXiv 2502.20087), section 3.2, "ConvFFN".

    Args:
        dim: channels in and out.
        hidden_dim: channels between.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(dim, hidden_dim, use_conv=True, use_grn=True)
        self.conv_dw = ResidualConv(hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.grn(self.conv_dw(self.act(self.fc1(x)))))
