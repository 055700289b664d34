"""Normalization in elementary operations."""

from __future__ import annotations

import torch
from timm.layers import GroupNorm1, LayerNorm2d
from torch import Tensor, nn

__all__ = ["ElementaryGroupNorm1", "ElementaryLayerNorm2d"]


class ElementaryLayerNorm2d(nn.Module):
    """Layer norm over the channels of maps (B, C, H, W), without moving the channels to the end.

    It takes over the parameters of the layer norm `norm`.
    """

    def __init__(self, norm: LayerNorm2d) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return normalized(x, (1,), self.eps, self.weight, self.bias)


class ElementaryGroupNorm1(nn.Module):
    """Group norm with one group: over all channels and positions of maps (B, C, H, W).

    It takes over the parameters of the group norm `norm`.
    """

    def __init__(self, norm: GroupNorm1) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return normalized(x, (1, 2, 3), self.eps, self.weight, self.bias)


def normalized(
    x: Tensor, axes: tuple[int, ...], eps: float, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return maps normalized over `axes`, then scaled and shifted a channel."""
    centered = x - x.mean(axes, keepdim=True)
    x = centered * torch.rsqrt(centered.square().mean(axes, keepdim=True) + eps)
    if weight is not None:
        x = x * weight.view(1, -1, 1, 1)
    return x if bias is None else x + bias.view(1, -1, 1, 1)
