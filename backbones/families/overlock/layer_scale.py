"""Layer scale with an offset."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backbones import merge

__all__ = ["LayerScale"]


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
        """Move the offset to the bias of a map whose outputs are added to this layer's."""
        merge.shift_into_previous(sibling, self.bias)
        self.bias = None
