"""Tiles of a map for neighborhood aggregation.

A tile is a rectangle of query positions with the smallest rectangle of key positions that holds
all their windows. Within a tile the aggregation is one matrix product (queries x keys).
"""

from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backbones.ops.dispatch import fixed

# Maps up to this many positions are one tile: there the zeros of a dense matrix cost less than
# the calls of several products.
_ONE_TILE = 256


def window_starts(length: int, k: int, device: torch.device) -> Tensor:
    """The first position of every position's window: clamp(i - k//2, 0, length - k)."""
    return (torch.arange(length, device=device) - k // 2).clamp(0, length - k)


@dataclass(frozen=True)
class Span:
    """Query positions first to stop - 1 on an axis of `length`, and their keys."""

    first: int
    stop: int
    length: int
    k: int

    def start(self, position: int) -> int:
        return min(max(position - self.k // 2, 0), self.length - self.k)

    @property
    def keys(self) -> slice:
        return slice(self.start(self.first), self.start(self.stop - 1) + self.k)

    def runs(self) -> list[tuple[int, int, int]]:
        """(first, stop, step): pieces on which a window's start moves by `step` per position."""
        inner = self.k // 2 + 1
        outer = max(self.length - self.k + self.k // 2, inner)
        pieces = [(0, inner, 0), (inner, outer, 1), (outer, self.length, 0)]
        clipped = [(max(a, self.first), min(b, self.stop), step) for a, b, step in pieces]
        return [piece for piece in clipped if piece[0] < piece[1]]


class Tile:
    """The product of two spans. Weights are (N, H, W, k, k), keys (N, c, H, W)."""

    def __init__(self, vertical: Span, horizontal: Span) -> None:
        self.vertical, self.horizontal = vertical, horizontal
        self.rows = slice(vertical.first, vertical.stop)
        self.cols = slice(horizontal.first, horizontal.stop)
        self.key_rows, self.key_cols = vertical.keys, horizontal.keys
        self.height = self.rows.stop - self.rows.start
        self.width = self.cols.stop - self.cols.start
        self.key_height = self.key_rows.stop - self.key_rows.start
        self.key_width = self.key_cols.stop - self.key_cols.start
        self.queries, self.keys = self.height * self.width, self.key_height * self.key_width
        # Whether all queries have the same window: then their weights are the matrix.
        self.shared = self.keys == vertical.k * horizontal.k

    def flat_keys(self, keys: Tensor) -> Tensor:
        """(N, c, keys)."""
        return keys[..., self.key_rows, self.key_cols].flatten(2)

    def matrix(self, weights: Tensor) -> Tensor:
        """(N, queries, keys): every query's weights at its window, zeros elsewhere."""
        if self.shared:
            return weights[:, self.rows, self.cols].flatten(3).flatten(1, 2)
        out = weights.new_zeros(weights.shape[0], self.queries, self.keys)
        for part, window in self._windows(out, weights):
            window.copy_(part)
        return out

    def collect(self, matrix: Tensor, weights: Tensor) -> None:
        """The inverse of :meth:`matrix`: fill this tile's part of `weights` from `matrix`."""
        if self.shared:
            target = weights[:, self.rows, self.cols]
            target.copy_(matrix.view(target.shape))
            return
        for part, window in self._windows(matrix, weights):
            part.copy_(window)

    def _windows(self, matrix: Tensor, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Pairs of views: weights of a piece of the tile, and where they are in the matrix."""
        pairs = []
        k, line = self.vertical.k, self.key_width
        for i, i_stop, down in self.vertical.runs():
            row = self.vertical.start(i) - self.key_rows.start
            for j, j_stop, right in self.horizontal.runs():
                col = self.horizontal.start(j) - self.key_cols.start
                query = (i - self.rows.start) * self.width + j - self.cols.start
                shape = (matrix.shape[0], i_stop - i, j_stop - j, k, k)
                # One query on: a row of the matrix, and the window's step within the row.
                strides = (self.width * self.keys + down * line, self.keys + right, line, 1)
                window = matrix.as_strided(
                    shape, (matrix.stride(0), *strides), query * self.keys + row * line + col
                )
                pairs.append((weights[:, i:i_stop, j:j_stop], window))
        return pairs

    def weight_places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return where the entries of the matrix (queries, keys) are among the weights.

        Returns:
            Their places in the flattened weights (queries, k*k) of the tile, one after the other,
            and a matrix (float32): 1 where a key is inside of a query's window, else 0. The place
            of one that is not means nothing.
        """
        spans = self.vertical, self.horizontal
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            # With free sizes `torch.compile` would hold those of constants open, too.
            return _as_tensors(_place_arrays(*spans), device)
        # As numbers, since compilers take nothing else to be constant.
        return _constant_places(*(astuple(span) for span in spans), device)


@torch.compiler.assume_constant_result  # so that a graph holds them and computes nothing
def _constant_places(
    vertical: tuple[int, ...], horizontal: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    return _as_tensors(_kept_places(Span(*vertical), Span(*horizontal)), device)


def _as_tensors(arrays: tuple[Any, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    index, inside = arrays
    return torch.from_numpy(index).to(device), torch.from_numpy(inside).to(device)


def _place_arrays(
    vertical: Span, horizontal: Span
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    k = vertical.k
    taps, inside = [], []  # of each axis: (queries, keys)
    for span in (vertical, horizontal):
        starts = np.array([span.start(i) for i in range(span.first, span.stop)])
        tap = np.arange(span.keys.start, span.keys.stop) - starts[:, None]
        taps.append(tap.clip(0, k - 1))
        inside.append((tap >= 0) & (tap < k))
    tap = taps[0][:, None, :, None] * k + taps[1][:, None]  # rows, columns of queries, of keys
    both = inside[0][:, None, :, None] & inside[1][:, None]
    queries = tap.shape[0] * tap.shape[1]
    first = np.arange(queries)[:, None] * (k * k)
    index = first + tap.reshape(queries, -1)
    return index.reshape(-1), both.reshape(queries, -1).astype(np.float32)


_kept_places = lru_cache(maxsize=64)(_place_arrays)


def split_map(height: int, width: int, k: int, edge: int) -> list[list[Tile]]:
    """Rows of tiles that cover the map, about `edge` positions wide and high."""
    height, width, k = fixed(height), fixed(width), fixed(k)
    if height * width <= _ONE_TILE:
        edge = max(height, width)
    return [
        [Tile(vertical, horizontal) for horizontal in _split(width, k, edge)]
        for vertical in _split(height, k, edge)
    ]


def _split(length: int, k: int, edge: int) -> list[Span]:
    count = -(-length // edge)
    bounds = [length * i // count for i in range(count + 1)]
    return [Span(a, b, length, k) for a, b in pairwise(bounds)]
