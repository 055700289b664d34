"""Normalization in elementary operations."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import GroupNorm1, LayerNorm2d
from torch import Tensor, nn

from backbones.layers.norm import CenteredNorm2d, to_unit_variance

__all__ = ["NORMS", "ElementaryNorm2d"]

NORMS = (CenteredNorm2d, GroupNorm1, LayerNorm2d)
FEW = 48  # channels whose mean is faster as a convolution, whose inner loop is over positions


class ElementaryNorm2d(nn.Module):
    """A norm of maps (B, C, H, W) over the channels, or over channels and positions.

    It takes over the parameters of `norm`, and moves no channels to the end.
    """

    def __init__(self, norm: CenteredNorm2d | GroupNorm1 | LayerNorm2d) -> None:
        super().__init__()
        self.is_centered = isinstance(norm, CenteredNorm2d)
        self.over_positions = isinstance(norm, GroupNorm1)
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        centered = x if self.is_centered else x - self.mean(x)
        return to_unit_variance(centered, self.mean, self.eps, self.weight, self.bias)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean (B, 1, H, W), or (B, 1, 1, 1) if the norm is over positions too."""
        if self.over_positions:
            return x.mean((1, 2, 3), keepdim=True)
        channels = x.shape[1]
        if channels > FEW:
            return x.mean(1, keepdim=True)
        return F.conv2d(x, x.new_full((1, channels, 1, 1), 1 / channels))
