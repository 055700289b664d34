"""Normalization in elementary operations."""

from __future__ import annotations

from timm.layers import GroupNorm1, LayerNorm2d
from torch import Tensor, nn

from backbones.layers.norm import to_unit_variance

__all__ = ["ElementaryNorm2d"]


class ElementaryNorm2d(nn.Module):
    """A norm of maps (B, C, H, W) over the channels, or over channels and positions.

    It takes over the parameters of `norm`, and moves no channels to the end.
    """

    def __init__(self, norm: LayerNorm2d | GroupNorm1) -> None:
        super().__init__()
        self.axes = (1,) if isinstance(norm, LayerNorm2d) else (1, 2, 3)
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(self.axes, keepdim=True)
        return to_unit_variance(centered, self.axes, self.eps, self.weight, self.bias)
