"""Spectral filter: multiply a map's two-dimensional spectrum with learned complex numbers.

Source: HorNet (Rao et al., NeurIPS 2022, arXiv 2207.14284), section 3.1, the global filter of
HorNet-GF, after Global Filter Networks (Rao et al., NeurIPS 2021, arXiv 2107.00645), section 3.2.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.errors import InputSizeError
from backbones.ops.dispatch import (
    at_least_float32,
    fixed,
    is_recorded,
    reference_active,
    without_autocast,
)
from backbones.ops.fourier import Dense, dense, separable

# On the CPU matrix products beat the fast Fourier transform up to this map side, but for even sides
# whose factors are small, and one matrix for both axes beats one for each up to this many positions
# (scripts/measure_ops.py).
_MATRIX_SIDE = 31
_FAST_SIDES = {24, 28, 30}
_DENSE_POSITIONS = 144


def spectral_filter(x: Tensor, weight: Tensor) -> Tensor:
    """Filter `x` in the frequency domain: ``irfft2(rfft2(x) * filter)``, orthonormal transforms.

    This is a depthwise circular convolution over the whole map. Spectra are computed in float32
    for half types (also under autocast), in float64 for float64.

    Args:
        x: (B, C, H, W), real.
        weight: (C, h, w, 2), the filter's real and imaginary parts for h x w bins of the half
            spectrum; resized by :func:`resize_filter` unless (h, w) is (H, W//2 + 1).

    Returns:
        (B, C, H, W) of `x`'s type.

    Raises:
        InputSizeError: the shapes do not fit each other.
    """
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[3] != 2 or x.shape[1] != weight.shape[0]:
        raise InputSizeError(
            "spectral_filter takes x (B, C, H, W) and weight (C, h, w, 2), "
            f"not {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    height, width = x.shape[2:]
    dtype = at_least_float32(x, weight)
    with without_autocast(x):
        filter_ = resize_filter(weight.to(dtype), (height, width))
        signal = x.to(dtype)
        if reference_active():
            out = _reference(signal, filter_)
        elif not _matrices_pay(x):
            out = _fast_fourier(signal, filter_)
        else:
            table = fixed(height), fixed(width), dtype == torch.float32
            if type(x) is Tensor and x.device.type == "cpu" and not is_recorded():
                matrices = _kept_matrices(*table)
            else:
                matrices = tuple(matrix.to(x.device) for matrix in _matrices(*table))
            # All axes at once takes fewer matrices than axis by axis.
            multiply = _at_once if len(matrices) == len(Dense._fields) else _axis_by_axis
            out = multiply(signal, filter_, matrices)
        return out.to(x.dtype)


def resize_filter(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a filter (C, h, w, 2) to the half spectrum of a map of `size` (H, W).

    Real and imaginary part separately, bilinear, corners aligned, over the two frequency axes in
    the transform's own order (not shifted), as the authors' code does for other input sizes.

    Returns:
        (C, H, W//2 + 1, 2); `weight` itself if it has this shape.
    """
    bins = (size[0], size[1] // 2 + 1)
    if weight.shape[1:3] == bins:
        return weight
    parts = weight.permute(3, 0, 1, 2)
    parts = F.interpolate(parts, size=bins, mode="bilinear", align_corners=True)
    return parts.permute(1, 2, 3, 0)


def _matrices_pay(x: Tensor) -> bool:
    if is_recorded():
        return True  # compilers and inference engines handle complex numbers badly or not at all
    # Accelerators may compute float32 products in a shorter type; their transform never does.
    sides = x.shape[2:]
    if x.device.type not in ("cpu", "meta") or max(sides) > _MATRIX_SIDE:
        return False
    # Counters of multiply-adds, which work without data, know products but no transforms.
    return x.device.type == "meta" or not _FAST_SIDES.issuperset(sides)


def _reference(x: Tensor, weight: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(x, norm="ortho") * torch.complex(weight[..., 0], weight[..., 1])
    return torch.fft.irfft2(spectrum, s=x.shape[2:], norm="ortho")


def _fast_fourier(x: Tensor, weight: Tensor) -> Tensor:
    """The reference without a copy of the filter, which has no form for recorders."""
    spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(weight.contiguous())
    return torch.fft.irfft2(spectrum, s=x.shape[2:], norm="ortho")


@torch.compiler.assume_constant_result  # so that a compiled graph holds them and computes nothing
def _matrices(height: int, width: int, single: bool) -> tuple[Tensor, ...]:
    table = dense if height * width <= _DENSE_POSITIONS else separable
    return tuple(torch.from_numpy(array) for array in table(height, width, single))


@lru_cache(maxsize=64)
def _kept_matrices(height: int, width: int, single: bool) -> tuple[Tensor, ...]:
    """The same for real tensors on the CPU; on small maps, handing them out is felt."""
    with torch.inference_mode(False):  # or no later call could be differentiated
        return _matrices(height, width, single)


def _at_once(x: Tensor, weight: Tensor, matrices: tuple[Tensor, ...]) -> Tensor:
    forward, turned, back = matrices
    return (_filtered(x.flatten(2), forward, turned, weight) @ back).view(x.shape)


def _axis_by_axis(x: Tensor, weight: Tensor, matrices: tuple[Tensor, ...]) -> Tensor:
    down, across, turned, back_across, back_down, rows = matrices
    batch, channels, height, width = x.shape
    half = height // 2 + 1
    waves = (down @ x).view(batch, channels, half, 2 * width)
    weight = weight.index_select(1, rows).unflatten(1, (half, -1))
    waves = _filtered(waves, across, turned, weight) @ back_across
    return back_down @ waves.view(batch, channels, 2 * half, width)


def _filtered(x: Tensor, forward: Tensor, turned: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ forward``, complex numbers in pairs, times the complex numbers in `weight`.

    Args:
        x: (B, C, ..., n).
        forward: (n, 2m): the pairs are real and imaginary part.
        turned: the matrix for i times the same numbers.
        weight: (C, ..., 2), in which the axes from the second last of `x` make m numbers.

    Returns:
        (B, C, ..., 2m).
    """
    spectrum = x @ forward
    if is_recorded():
        # (a + bi)(c + di) = (a + bi) c + i(a + bi) d: engines have no complex numbers, and taking
        # pairs apart and together costs them more than a second product with a small matrix.
        factors = (part.unsqueeze(-1).expand_as(weight) for part in weight.unbind(-1))
        real, imaginary = (part.flatten(x.ndim - 2) for part in factors)
        return spectrum * real + (x @ turned) * imaginary
    numbers = torch.view_as_complex(spectrum.unflatten(-1, (-1, 2)))
    factor = torch.view_as_complex(weight.contiguous()).flatten(x.ndim - 2)
    return torch.view_as_real(numbers * factor).flatten(-2)
