"""Filters that change a map's lowest frequencies only, as a product of low rank.

Source: SPANet (Yun et al., ICCV 2023, arXiv 2308.11568), section 3.2, spectral pooling.
"""

import math

import torch
from torch import Tensor

from backbones.ops.dispatch import (
    at_least_float32,
    fixed,
    reference_active,
    without_autocast,
)
from backbones.ops.fourier import disc, low_waves

Gains = tuple[tuple[int, float, float], ...]


def amplify_low_frequencies(x: Tensor, radius: int, gains: Gains) -> Tensor:
    """Add to `x` a multiple of its components around frequency zero.

    A bin of the two-dimensional spectrum at distance d of bin (0, 0), both counted in bins, gains
    the factor ``1 + inside`` for ``d < radius`` and ``1 + edge`` for ``d == radius``. The spectrum
    of n rows has the bins ``-(n // 2)`` to ``(n - 1) // 2``. These few components are products with
    real waves, (H * W, K), K = 5 or 13 for a radius of 1 or 2, in the type of `x`.

    Args:
        x: (B, C, H, W), real.
        radius: of the disc, in bins.
        gains: (channels, inside, edge) of each share of the channels, in order.

    Returns:
        (B, C, H, W) of `x`'s type.
    """
    if reference_active():
        return _reference(x, radius, gains)
    if torch.compiler.is_compiling():
        waves = _recorded_waves(x, radius)
    else:
        height, width = map(fixed, x.shape[2:])
        waves = torch.from_numpy(low_waves(height, width, radius, x.dtype != torch.float64))
    waves = waves.to(x.device, x.dtype)  # (K, N)
    found = x.flatten(2) @ waves.mT * _factors(x, radius, gains)  # (B, C, N) to (B, C, K)
    return x + (found @ waves).reshape(x.shape)


def _factors(x: Tensor, radius: int, gains: Gains) -> Tensor:
    """Return the factor of each wave in each channel, (C, K)."""
    _, _, is_edge = disc(radius)
    shares = []
    for channels, inside, edge in gains:
        row = [edge if on else inside for on in is_edge]
        share = torch.tensor(row, device=x.device, dtype=x.dtype)
        shares.append(share.expand(channels, -1))
    return torch.cat(shares)


def _recorded_waves(x: Tensor, radius: int) -> Tensor:
    """Compute :func:`backbones.ops.fourier.low_waves` in a graph, which may leave sizes open."""
    rows, columns, _ = disc(radius)
    of_rows, of_columns = (_computed_axis(x, side, radius) for side in x.shape[2:])
    down = torch.stack([of_rows[i] for i in rows])  # (K, H)
    across = torch.stack([of_columns[j] for j in columns])  # (K, W)
    return (down.unsqueeze(2) * across.unsqueeze(1)).flatten(1)


def _computed_axis(x: Tensor, side: int, radius: int) -> list[Tensor]:
    dtype = at_least_float32(x)
    length = torch.scalar_tensor(side, device=x.device, dtype=dtype)
    turns = torch.arange(side, device=x.device, dtype=dtype) / length
    waves = [torch.ones_like(turns) / length.sqrt()]
    for order in range(1, radius + 1):
        amplitude = ((length + 1 - 2 * order).clamp(0, 2) / length).sqrt()
        angles = turns * (2 * math.pi * order)
        waves += [amplitude * angles.cos(), amplitude * angles.sin()]
    return waves


def _reference(x: Tensor, radius: int, gains: Gains) -> Tensor:
    height, width = x.shape[2:]
    rows = torch.arange(height, device=x.device) - height // 2
    columns = torch.arange(width, device=x.device) - width // 2
    distance = rows.unsqueeze(1) ** 2 + columns**2  # squared; (H, W)
    dtype = at_least_float32(x)
    is_inside = (distance < radius**2).to(dtype)
    is_edge = (distance == radius**2).to(dtype)
    shares = [
        (1 + inside * is_inside + edge * is_edge).expand(channels, -1, -1)
        for channels, inside, edge in gains
    ]
    factor = torch.fft.ifftshift(torch.cat(shares), (1, 2))
    with without_autocast(x):
        spectrum = torch.fft.fft2(x.to(dtype)) * factor
        return torch.fft.ifft2(spectrum).real.to(x.dtype)
