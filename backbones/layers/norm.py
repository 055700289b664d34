"""Normalization layers that several families share (LayerNorm itself is timm's)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from backbones.layers.tracing import fx_leaf

__all__ = ["CenteredNorm2d", "GlobalResponseNorm", "scaled", "statistics_dtype", "to_unit_variance"]


@fx_leaf
def statistics_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which statistics over `x` are taken: float32 for the half types."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


class GlobalResponseNorm(nn.Module):
    """Scale each channel by its energy relative to the other channels.

    ``G = ||x||_2`` over height and width, ``N = G / (mean over channels of G + eps)``,
    ``out = x * (1 + weight * N) + bias``. Source: ConvNeXt V2 (arXiv 2301.00808), section 3.2.
    Energies are taken in float32 for the half types, where a sum of squares would overflow.

    Args:
        dim: number of channels C.
        channels_last: the input is (B, H, W, C) instead of (B, C, H, W).
        eps: added to the mean energy.
    """

    def __init__(self, dim: int, channels_last: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.channel_axis = -1 if channels_last else 1
        self.spatial_axes = (1, 2) if channels_last else (2, 3)
        self.shape = (1, 1, 1, -1) if channels_last else (1, -1, 1, 1)
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        energy = torch.linalg.vector_norm(
            x, dim=self.spatial_axes, keepdim=True, dtype=statistics_dtype(x)
        )
        relative = energy / (energy.mean(dim=self.channel_axis, keepdim=True) + self.eps)
        scale = 1 + self.weight.view(self.shape) * relative
        x = x * scale.to(x.dtype)
        return x if self.bias is None else x + self.bias.view(self.shape).to(x.dtype)


class CenteredNorm2d(nn.Module):
    """Layer norm over the channels of maps (B, C, H, W) whose mean over channels is zero.

    It takes over the parameters of the layer norm `norm`.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        return to_unit_variance(x, self.mean, self.eps, self.weight, self.bias)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over channels, (B, 1, H, W)."""
        return x.mean(1, keepdim=True)


def to_unit_variance(
    x: Tensor,
    mean: Callable[[Tensor], Tensor],
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Scale maps (B, C, H, W) whose `mean` is zero to variance 1, then each channel."""
    variance = mean(x.to(statistics_dtype(x)).square())
    return scaled(x * (variance + eps).rsqrt().to(x.dtype), weight, bias)


def scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Multiply each channel of maps (B, C, H, W) by its weight and add its bias."""
    if weight is not None:
        x = x * weight.view(1, -1, 1, 1)
    return x if bias is None else x + bias.view(1, -1, 1, 1)
