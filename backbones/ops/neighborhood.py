"""Neighborhood aggregation: every position takes a weighted mean over its own k x k window.

At the border a window is shifted into the map instead of being padded (NATTEN's rule), so that
every position sees k x k positions of the map. Source: Neighborhood Attention Transformer (Hassani
et al., CVPR 2023, arXiv 2204.07143), section 3.1; used by OverLoCK (Lou and Yu, CVPR 2025,
arXiv 2502.20087), section 3.3, with dynamic kernels as weights.
"""

import torch
from torch import Tensor

from backbones.errors import InputSizeError
from backbones.ops.bilinear import Bilinear
from backbones.ops.dispatch import (
    at_least_float32,
    is_recorded,
    is_symbolic,
    is_transformed,
    reference_active,
    without_autocast,
)
from backbones.ops.tiles import Tile, split_map, window_starts


def neighborhood_aggregation(value: Tensor, attention: Tensor, kernel_size: int) -> Tensor:
    """Aggregate `value` over each position's window with that position's weights.

    ``out[c, i, j] = sum_{a, b} value[c, s(i, H) + a, s(j, W) + b] * attention[i, j, k*a + b]`` for
    every image and group, with the window's start ``s(i, L) = clamp(i - k//2, 0, L - k)``; a and b
    run from 0 to k - 1.

    Memory beyond the arguments and the result does not grow with k*k on large maps: they are
    worked through in tiles. Half types are accumulated in float32 and rounded once.

    Args:
        value: (B, G, c, H, W), any strides.
        attention: (B, G, H, W, k*k), any strides; usually a softmax over the last axis.
        kernel_size: k, odd or even, at most min(H, W).

    Returns:
        (B, G, c, H, W) of `value`'s type.

    Raises:
        InputSizeError: the map is smaller than the kernel, or the shapes do not fit each other.
    """
    _check(value, attention, kernel_size)
    dtype = at_least_float32(value, attention)
    if value.device.type not in ("cpu", "meta"):
        # Accelerators accumulate products of half types in float32 by themselves.
        dtype = torch.promote_types(value.dtype, attention.dtype)
    with without_autocast(value):
        v, a = value.to(dtype), attention.to(dtype)
        if reference_active() or is_symbolic(*value.shape[-2:]):
            out = _reference(v, a, kernel_size)
        elif is_recorded():
            out = _recorded(v, a, kernel_size)
        else:
            out = _Neighborhood.apply(v, a, kernel_size)
        return out.to(value.dtype)


def neighborhood_bias(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Spread a table of relative position biases over a map, in the layout of attention weights.

    ``out[g, i, j, k*a + b] = table[g, s(i, H) - i + k - 1 + a, s(j, W) - j + k - 1 + b]``

    Args:
        table: (G, 2k - 1, 2k - 1).
        size: (H, W) of the map, both at least k.

    Returns:
        (G, H, W, k*k); gradients reach `table`.

    Raises:
        InputSizeError: the table is not square with an odd side, or the map is smaller than k.
    """
    if table.ndim != 3 or table.shape[1] != table.shape[2] or table.shape[1] % 2 == 0:
        raise InputSizeError(
            f"neighborhood_bias: the table must be (G, 2k - 1, 2k - 1), not {tuple(table.shape)}"
        )
    k = (table.shape[1] + 1) // 2
    height, width = size
    _check_map(height, width, k)
    rows, cols = (_first_offsets(length, k, table.device) for length in size)
    # Mapped, the gradient of `unfold` takes a loop; compilers cannot be asked, and need not be.
    if reference_active() or (not is_recorded() and is_transformed(table)):
        taps = torch.arange(k, device=table.device)
        row = (rows[:, None] + taps)[:, None, :, None]
        col = (cols[:, None] + taps)[None, :, None, :]
        return table[:, row, col].reshape(table.shape[0], height, width, k * k)
    # Axis by axis, which is faster than gathering single entries.
    if is_recorded():  # engines know selections, and not all of them windows
        taps = torch.arange(k, device=table.device)
        row, col = ((first[:, None] + taps).flatten() for first in (rows, cols))
        out = table.index_select(1, row).index_select(2, col)  # (G, H * a, W * b)
        out = out.unflatten(2, (-1, k)).unflatten(1, (-1, k))  # (G, H, a, W, b)
        return out.transpose(2, 3).flatten(3)
    out = table.unfold(1, k, 1).index_select(1, rows)  # (G, H, 2k - 1, a)
    out = out.unfold(2, k, 1).index_select(2, cols)  # (G, H, W, a, b)
    return out.flatten(3)


def _first_offsets(length: int, k: int, device: torch.device) -> Tensor:
    """For every position, the row of a (2k - 1) table that belongs to its window's first tap."""
    positions = torch.arange(length, device=device)
    return window_starts(length, k, device) - positions + (k - 1)


def _check_map(height: int, width: int, k: int) -> None:
    if k < 1 or height < k or width < k:
        raise InputSizeError(
            f"a neighborhood of {k} x {k} does not fit into a map of {height} x {width}; "
            "enlarge the map or use a smaller kernel"
        )


def _check(value: Tensor, attention: Tensor, k: int) -> None:
    if value.ndim != 5 or attention.ndim != 5:
        raise InputSizeError(
            "neighborhood_aggregation takes value (B, G, c, H, W) and attention (B, G, H, W, k*k), "
            f"not {tuple(value.shape)} and {tuple(attention.shape)}"
        )
    batch, groups, _, height, width = value.shape
    _check_map(height, width, k)
    if attention.shape != (batch, groups, height, width, k * k):
        raise InputSizeError(
            f"neighborhood_aggregation: value {tuple(value.shape)} and kernel size {k} need "
            f"attention {(batch, groups, height, width, k * k)}, not {tuple(attention.shape)}"
        )


def _reference(value: Tensor, attention: Tensor, k: int) -> Tensor:
    """Gather every window, multiply, sum. Takes k*k times the map's memory."""
    height, width = value.shape[-2:]
    taps = torch.arange(k, device=value.device)
    rows = window_starts(height, k, value.device)[:, None] + taps
    cols = window_starts(width, k, value.device)[:, None] + taps
    windows = value[..., rows[:, None, :, None], cols[None, :, None, :]]  # (B, G, c, H, W, k, k)
    return (windows.flatten(-2) * attention.unsqueeze(2)).sum(-1)


def _recorded(value: Tensor, attention: Tensor, k: int) -> Tensor:
    """Tile by tile: spread the weights over a matrix of the tile's keys, then multiply.

    Engines gather by an index that they know faster than they scatter.
    """
    height, width = value.shape[-2:]
    rows = []
    for row in split_map(height, width, k, edge=16):
        blocks = []
        for tile in row:
            keys = value[..., tile.key_rows, tile.key_cols].flatten(3).flatten(0, 1)
            weights = attention[:, :, tile.rows, tile.cols].flatten(2, 3).flatten(0, 1)
            if not tile.shared:
                index, inside = tile.weight_places(value.device)
                matrix = weights.flatten(1).index_select(1, index)
                weights = matrix.view(-1, tile.queries, tile.keys) * inside.to(weights.dtype)
            block = torch.bmm(keys, weights.transpose(1, 2))
            blocks.append(block.view(*value.shape[:3], tile.height, tile.width))
        rows.append(torch.cat(blocks, -1) if len(blocks) > 1 else blocks[0])
    return torch.cat(rows, -2) if len(rows) > 1 else rows[0]


class _Neighborhood(Bilinear):
    """The eager path, forward and backward: a matrix product per tile.

    The matrices are rebuilt in the backward pass, so that training keeps only the arguments.
    """

    recorded = staticmethod(_recorded)

    @staticmethod
    def forward(value: Tensor, attention: Tensor, k: int) -> Tensor:
        keys, weights = _merge_groups(value, attention, k)
        tiles = _tiles(value, k)
        if len(tiles) == 1:
            return _multiply(keys, weights, tiles[0]).view(value.shape)
        out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        merged = out.view(keys.shape)
        for tile in tiles:
            block = _multiply(keys, weights, tile)
            merged[..., tile.rows, tile.cols] = block.view(*keys.shape[:2], tile.height, tile.width)
        return out

    @staticmethod
    def gradients(
        value: Tensor, attention: Tensor, k: int, grad: Tensor, needed: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor]:
        keys, weights = _merge_groups(value, attention, k)
        grad = grad.reshape(keys.shape)
        # Tiles share keys, so their gradients add up: in float32 also for half types.
        grad_keys = torch.zeros(keys.shape, dtype=at_least_float32(keys), device=keys.device)
        grad_weights = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)
        for tile in _tiles(value, k):
            grad_out = grad[..., tile.rows, tile.cols].reshape(*keys.shape[:2], tile.queries)
            product = torch.bmm(grad_out, tile.matrix(weights))
            size = (*keys.shape[:2], tile.key_height, tile.key_width)
            grad_keys[..., tile.key_rows, tile.key_cols] += product.view(size)
            grad_matrix = torch.bmm(grad_out.transpose(1, 2), tile.flat_keys(keys))
            tile.collect(grad_matrix, grad_weights)
        grad_value = grad_keys.to(value.dtype).view(value.shape)
        return grad_value, grad_weights.view(attention.shape)


def _tiles(value: Tensor, k: int) -> list[Tile]:
    edge = 8 if value.device.type == "cpu" else 16  # accelerators prefer fewer, larger products
    return [tile for row in split_map(value.shape[-2], value.shape[-1], k, edge) for tile in row]


def _merge_groups(value: Tensor, attention: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Batch and groups as one axis: (N, c, H, W) and (N, H, W, k, k)."""
    return value.flatten(0, 1), attention.flatten(0, 1).unflatten(-1, (k, k))


def _multiply(keys: Tensor, weights: Tensor, tile: Tile) -> Tensor:
    """(N, c, queries) of one tile."""
    # In this order, with c as the last axis of the product, BLAS is about twice as fast.
    product = torch.bmm(tile.matrix(weights), tile.flat_keys(keys).transpose(1, 2))
    return product.transpose(1, 2).contiguous()
