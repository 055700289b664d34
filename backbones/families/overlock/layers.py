"""Layers that the base and overview nets and the focus net share."""

import torch
from torch import Tensor, nn

from backbones import merge
from backbones.layers import ChannelMlp, ResidualConv

__all__ = ["ConvMlp", "LayerScale"]


class ConvMlp(ChannelMlp):
    """``fc2(GRN(conv_dw(GELU(fc1(x)))))`` on (B, C, H, W), `conv_dw` a residual convolution.

    Source: OverLoCK (arXiv 2502.20087), section 3.2, "ConvFFN".

    Args:
        dim: channels in and out.
        hidden_dim: channels between.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(dim, hidden_dim, use_conv=True, use_grn=True)
        self.conv_dw: nn.Conv2d = ResidualConv(hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_dw(self.act(self.fc1(x)))  # B D H W
        return self.fc2(self.grn(x))  # B C H W

    def reparameterize(self) -> None:
        """Fold the residual into the depthwise kernel, and what the base class folds."""
        super().reparameterize()
        if isinstance(self.conv_dw, ResidualConv):
            self.conv_dw = self.conv_dw.merged()


class LayerScale(nn.Module):
    """``weight * x + bias`` for each channel of (B, C, H, W); one and zero to begin with."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.weight.view(1, -1, 1, 1)
        return x if self.bias is None else x + self.bias.view(1, -1, 1, 1)

    def shift_into(self, sibling: nn.Module) -> None:
        """Move the offset to the bias of a linear layer whose outputs are added to this one's."""
        merge.shift_into_previous(sibling, self.bias)
        self.bias = None
