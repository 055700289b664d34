"""Norms of our own, and the type in which norms take their statistics."""

import torch
from torch import Tensor, nn

from backbones.layers.tracing import fx_leaf

__all__ = ["GlobalResponseNorm", "VectorBatchNorm", "statistics_dtype"]


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
        )  # B 1 1 C or B C 1 1
        relative = energy / (energy.mean(dim=self.channel_axis, keepdim=True) + self.eps)
        scale = 1 + self.weight.view(self.shape) * relative
        x = x * scale.to(x.dtype)
        return x if self.bias is None else x + self.bias.view(self.shape).to(x.dtype)


class VectorBatchNorm(nn.BatchNorm1d):
    """Batch norm over the last axis of (..., C), so that feature maps may be left unpooled."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of axes."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, -2)).reshape(input.shape)  # N C, then ... C
