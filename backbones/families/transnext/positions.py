"""What TransNeXt's attention knows of positions: it follows from a map's height and width.

Source: TransNeXt (arXiv 2311.17132), section 3, and the authors' code for segmentation
with extrapolated biases, which takes any size.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import ops
from backbones.layers import fx_leaf

__all__ = ["PositionBias", "Tables", "tables_of"]

HIDDEN = 512  # of the network that computes the biases
AT_ONCE = 1024  # distances whose biases eager mode computes in one go
Array = npt.NDArray[np.generic]


class Tables(NamedTuple):
    """Constants of a map of H x W positions that look at P = pH * pW pooled ones."""

    coordinates: Tensor  # (U, V, 2): every distinct distance, log-spaced, down and across
    rows: Tensor  # (pH * H,): which of the U distances each pair of a pooled and another row has
    columns: Tensor  # (pW * W,)
    pool_rows: Tensor  # (pH, H): adaptive average pooling as matrices
    pool_columns: Tensor  # (pW, W)
    outside: Tensor  # (9, N): minus infinity at the taps of a 3x3 window outside the map, else 0
    lengths: Tensor  # (N,): logarithm of the number of keys that a position sees, with its window


@fx_leaf
def tables_of(x: Tensor, ratio: int, pretrain: int) -> Tables:
    """Return the tables of a map (B, H, W, C), on its device, in its type but at least float32.

    Args:
        x: the map.
        ratio: positions of a pooled one on each axis; sizes need not be multiples of it, and
            smaller ones are pooled to one.
        pretrain: side of the map in training, by which distances are scaled.
    """
    height, width = (ops.fixed(side) for side in x.shape[1:3])
    return Tables(*_tensors(height, width, ratio, pretrain, ops.at_least_float32(x), x.device))


@torch.compiler.assume_constant_result  # so that a graph holds them and computes nothing
def _tensors(
    height: int, width: int, ratio: int, pretrain: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    arrays = _arrays(height, width, ratio, pretrain, dtype == torch.float32)
    return tuple(torch.from_numpy(array).to(device) for array in arrays)


@lru_cache(maxsize=64)
def _arrays(height: int, width: int, ratio: int, pretrain: int, single: bool) -> tuple[Array, ...]:
    """Compute the tables in float64; they are float32 if `single`, but for the indices."""
    (down, rows, pool_rows), (across, columns, pool_columns) = (
        _axis(side, ratio, pretrain) for side in (height, width)
    )
    coordinates = np.stack(np.meshgrid(down, across, indexing="ij"), -1)
    tap = np.arange(-1, 2)[:, None]
    inside = [(tap + np.arange(n) >= 0) & (tap + np.arange(n) < n) for n in (height, width)]
    window = (inside[0][:, None, :, None] & inside[1][:, None, :]).reshape(9, -1)
    outside = np.where(window, 0.0, -np.inf)
    lengths = np.log(window.sum(0) + len(pool_rows) * len(pool_columns))
    floats = [
        array.astype(np.float32 if single else np.float64)
        for array in (coordinates, pool_rows, pool_columns, outside, lengths)
    ]
    return floats[0], rows, columns, *floats[1:]


def _axis(n: int, ratio: int, pretrain: int) -> tuple[Array, Array, Array]:
    """Return an axis' distinct coordinates, the index of each pair's, and the pooling matrix."""
    p = max(1, n // ratio)
    first, stop = np.arange(p)[:, None] * n // p, -(-(np.arange(p)[:, None] + 1) * n // p)
    position = np.arange(n)
    # Distances from the centers of the pooled windows, doubled: integers, equal or not.
    apart, index = np.unique(2 * position - (first + stop - 1), return_inverse=True)
    scaled = 4 * apart / (pretrain - 1)
    coordinates = np.sign(scaled) * np.log2(1 + np.abs(scaled)) / 3
    window = (first <= position) & (position < stop)
    return coordinates, index.reshape(-1), window / window.sum(1, keepdims=True)


class PositionBias(nn.Module):
    """Biases of attention logits by a small network of the distance, log-spaced.

    Args:
        num_heads: biases of each distance, G.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, HIDDEN)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Linear(HIDDEN, num_heads)

    def forward(self, tables: Tables) -> Tensor:
        """Return the biases of every pooled and every other position, (G, P, N)."""
        bias = _by_distance(tables.coordinates, self)  # U V G
        bias = bias.permute(2, 0, 1).index_select(1, tables.rows).index_select(2, tables.columns)
        bias = bias.unflatten(2, tables.pool_columns.shape)  # G pH*H pW W
        bias = bias.unflatten(1, tables.pool_rows.shape)  # G pH H pW W
        return bias.transpose(2, 3).flatten(3).flatten(1, 2)


@fx_leaf
def _by_distance(coordinates: Tensor, network: PositionBias) -> Tensor:
    """Return the bias of each distance: coordinates (U, V, 2) to (U, V, G), in their type."""
    with ops.without_autocast(coordinates):
        if ops.is_recorded():
            return _run(coordinates, network)
        # The hidden features of all at once are many times what the processor's cache holds.
        parts = [_run(part, network) for part in coordinates.flatten(0, 1).split(AT_ONCE)]
        return torch.cat(parts).unflatten(0, coordinates.shape[:2])


def _run(x: Tensor, network: PositionBias) -> Tensor:
    for layer in (network.fc1, network.act, network.fc2):
        if isinstance(layer, nn.Linear) and layer.weight.dtype != x.dtype:
            x = F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
        else:
            x = layer(x)
    return x
