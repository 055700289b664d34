"""Normalization in the operations that OpenVINO computes where the data lies."""

import torch.nn.functional as F
from timm.layers import GroupNorm1, LayerNorm2d
from torch import Tensor, nn

from backbones.families.unireplknet import CenteredNorm2d, scaled, to_unit_variance

__all__ = ["FEW", "DecomposedNorm2d", "WholeNorm2d"]

FEW = 48  # channels whose mean is faster as a convolution, whose inner loop is over positions


class DecomposedNorm2d(nn.Module):
    """A norm of feature maps (B, C, H, W) over the channels, in plain operations.

    It takes over the parameters of `norm`, and moves no channels to the end.
    """

    def __init__(self, norm: CenteredNorm2d | LayerNorm2d) -> None:
        super().__init__()
        self.is_centered = isinstance(norm, CenteredNorm2d)
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        centered = x if self.is_centered else x - self.mean(x)
        return to_unit_variance(centered, self.mean, self.eps, self.weight, self.bias)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over channels, (B, 1, H, W)."""
        channels = x.shape[1]
        if channels > FEW:
            return x.mean(1, keepdim=True)
        return F.conv2d(x, x.new_full((1, channels, 1, 1), 1 / channels))


class WholeNorm2d(nn.Module):
    """A norm of feature maps (B, C, H, W) over channels and positions, as a layer norm of three
    axes.

    It takes over the parameters of `norm`. Exporters write group norm with reshapes around it,
    and reductions take three times as long as the kernel for this.
    """

    def __init__(self, norm: GroupNorm1) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return scaled(F.layer_norm(x, x.shape[1:], eps=self.eps), self.weight, self.bias)
