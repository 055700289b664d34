"""Attention biases that depend on how far apart two positions of a map are."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.layers.norm import statistics_dtype
from backbones.layers.tracing import fx_leaf

__all__ = ["distance_bias", "resize_tables"]

DENSE_SIZE = 14  # side of the maps that LSNet's dense models hold biases for


def resize_tables(tables: Tensor, size: int) -> Tensor:
    """Resize bias tables (heads, S*S) to (heads, size*size), in at least float32."""
    side = math.isqrt(tables.shape[1])
    if side == size:
        return tables
    square = tables.to(statistics_dtype(tables)).view(1, -1, side, side)
    square = F.interpolate(square, size=(size, size), mode="bicubic", align_corners=False)
    return square.flatten(2)[0]


@fx_leaf
def distance_bias(x: Tensor, tables: Tensor) -> Tensor:
    """Return what is added to the attention logits of a map `x`: (heads, H*W, H*W).

    Entry ``|dy| * S + |dx|`` of a table (heads, S*S) is the bias of two positions that far apart.
    A map of S x S takes the tables as they are. Any other goes the way of the authors' dense
    models: tables for 14x14, whose bias matrix is resized like an image.
    """
    height, width = x.shape[-2:]
    size = math.isqrt(tables.shape[1])
    if (height, width) != (size, size):
        size = DENSE_SIZE
        tables = resize_tables(tables, size)
    steps = torch.arange(size, device=tables.device)
    apart = (steps[:, None] - steps).abs()
    pairs = tables.unflatten(1, (size, size))[:, apart][..., apart]  # (heads, y, y', x, x')
    matrix = pairs.transpose(2, 3).flatten(3).flatten(1, 2)
    if height * width != size * size:
        matrix = matrix.to(statistics_dtype(matrix)).unsqueeze(0)
        area = (height * width, height * width)
        matrix = F.interpolate(matrix, size=area, mode="bicubic", align_corners=False)[0]
    return matrix
