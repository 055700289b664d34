"""Spectral filter: multiply a map's two-dimensional spectrum with learned complex numbers.

Source: HorNet (Rao et al., NeurIPS 2022, arXiv 2207.14284), section 3.1, the global filter of
HorNet-GF, after Global Filter Networks (Rao et al., NeurIPS 2021, arXiv 2107.00645), section 3.2.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.errors import InputSizeError
from backbones.ops.dispatch import (
    at_least_float32,
    fixed,
    is_autocast,
    is_recorded,
    reference_active,
)
from backbones.ops.fourier import Dense, dense, horizontal, separable

# Measured on the CPU (scripts/measure_ops.py). Up to so many positions one matrix for both axes
# beats one for each. Up to the first side, products beat the fast transform on both axes; up to the
# second on the horizontal one, where the fast transform has to take and give real numbers.
_DENSE_POSITIONS = 144
_MATRIX_SIDE = 23
_MIXED_SIDE = 47
_FAST_WIDTH = 32  # but the fast transform is good at this width even with real numbers,
_FAST_MAP = (16, 16)  # and on this small map at complex columns.
_SMOOTH = (2 * 3 * 5 * 7 * 11 * 13) ** 5  # divisible by the sides whose fast transform is fast

Transform = Callable[[Tensor, Tensor], Tensor]
Matrices = tuple[Tensor, ...]


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
    device = x.device.type
    if device == "cpu" and type(x) is Tensor and not (reference_active() or is_recorded()):
        transform = _on_cpu(x.shape, weight.shape, x.dtype, weight.dtype)
    else:
        _check(x.shape, weight.shape)
        transform = partial(_converted, _by_context)
    if not is_autocast(device):  # on small maps entering a context that does nothing is felt
        return transform(x, weight)
    with torch.autocast(device, enabled=False):
        return transform(x, weight)


def resize_filter(weight: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a filter (C, h, w, 2) to the half spectrum of a map of `size` (H, W).

    Real and imaginary part separately, bilinear, corners aligned, over the two frequency axes in
    the transform's own order (not shifted), as the authors' code does for other input sizes.

    Returns:
        (C, H, W//2 + 1, 2); `weight` itself if it has this shape.
    """
    bins = _bins(size)
    if weight.shape[1:3] == bins:
        return weight
    parts = weight.permute(3, 0, 1, 2)
    parts = F.interpolate(parts, size=bins, mode="bilinear", align_corners=True)
    return parts.permute(1, 2, 3, 0)


def _bins(size: Sequence[int]) -> tuple[int, int]:
    """Return the shape of the half spectrum of a map of `size`."""
    return (size[0], size[1] // 2 + 1)


def _check(shape: torch.Size, bins: torch.Size) -> None:
    if len(shape) != 4 or len(bins) != 4 or bins[3] != 2 or shape[1] != bins[0]:
        raise InputSizeError(
            "spectral_filter takes x (B, C, H, W) and weight (C, h, w, 2), "
            f"not {tuple(shape)} and {tuple(bins)}"
        )


def _converted(transform: Transform, x: Tensor, weight: Tensor) -> Tensor:
    """Filter by `transform`, which takes one type of at least 32 bits and a filter that fits."""
    dtype = at_least_float32(x, weight)
    weight = resize_filter(weight.to(dtype), x.shape[2:])
    return transform(x.to(dtype), weight).to(x.dtype)


def _by_context(x: Tensor, weight: Tensor) -> Tensor:
    if reference_active():
        return _reference(x, weight)
    # Compilers and inference engines handle complex numbers badly or not at all; counters of
    # multiply-adds, which work without data, know products but no transforms.
    if is_recorded() or x.device.type in ("cpu", "meta"):
        height, width = (fixed(side) for side in x.shape[2:])
        matrices = _matrices(height, width, x.dtype == torch.float32)
        return _by_matrices(x, weight, tuple(matrix.to(x.device) for matrix in matrices))
    # Accelerators may compute float32 products in a shorter type; their transform never does.
    return _fast_fourier(x, weight)


@lru_cache(maxsize=256)  # on small maps every line of Python is felt
def _on_cpu(
    shape: torch.Size, bins: torch.Size, x_dtype: torch.dtype, weight_dtype: torch.dtype
) -> Transform:
    """All that shapes and types decide for plain tensors with data."""
    _check(shape, bins)
    height, width = shape[2:]
    dtype = torch.promote_types(torch.promote_types(x_dtype, weight_dtype), torch.float32)
    transform = _best(height, width, dtype == torch.float32, shape[0] == 0)
    fits = x_dtype == weight_dtype == dtype and bins[1:3] == _bins((height, width))
    return transform if fits else partial(_converted, transform)


def _best(height: int, width: int, single: bool, empty: bool) -> Transform:
    longest = max(height, width)
    smooth = _SMOOTH % height == 0
    # MKL's transform refuses an empty batch on some processors.
    fast = longest > _MIXED_SIDE or (smooth and width == _FAST_WIDTH)
    if fast and not empty:
        return _fast_fourier
    with torch.inference_mode(False):  # or no later call could be differentiated
        if empty or not smooth or (longest <= _MATRIX_SIDE and (height, width) != _FAST_MAP):
            return partial(_by_matrices, matrices=_matrices(height, width, single))
        matrices = tuple(map(torch.from_numpy, horizontal(height, width, single)))
        return partial(_mixed, matrices=matrices)


def _reference(x: Tensor, weight: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(x, norm="ortho") * torch.complex(weight[..., 0], weight[..., 1])
    return torch.fft.irfft2(spectrum, s=x.shape[2:], norm="ortho")


def _fast_fourier(x: Tensor, weight: Tensor) -> Tensor:
    """The reference with one scaling and without a copy of the filter."""
    spectrum = torch.fft.rfft2(x) * torch.view_as_complex(weight.contiguous())
    return torch.fft.irfft2(spectrum, s=x.shape[2:])


def _mixed(x: Tensor, weight: Tensor, matrices: Matrices) -> Tensor:
    """Rows by products, which hold the scaling, and columns by the fast transform."""
    across, back_across = matrices
    shape = (*x.shape[:3], *weight.shape[2:])
    waves = torch.view_as_complex((x @ across).view(shape))
    spectrum = torch.fft.fft(waves, dim=2) * torch.view_as_complex(weight.contiguous())
    # The transform leaves columns contiguous; of numbers in pairs the copy would be slow.
    waves = torch.fft.ifft(spectrum, dim=2, norm="forward").contiguous()
    return torch.view_as_real(waves).flatten(-2) @ back_across


@torch.compiler.assume_constant_result  # so that a compiled graph holds them and computes nothing
def _matrices(height: int, width: int, single: bool) -> Matrices:
    table = dense if height * width <= _DENSE_POSITIONS else separable
    return tuple(torch.from_numpy(array) for array in table(height, width, single))


def _by_matrices(x: Tensor, weight: Tensor, matrices: Matrices) -> Tensor:
    # All axes at once takes fewer matrices than axis by axis.
    multiply = _at_once if len(matrices) == len(Dense._fields) else _axis_by_axis
    return multiply(x, weight, matrices)


def _at_once(x: Tensor, weight: Tensor, matrices: Matrices) -> Tensor:
    forward, turned, back = matrices
    return (_filtered(x.flatten(2), forward, turned, weight) @ back).view(x.shape)


def _axis_by_axis(x: Tensor, weight: Tensor, matrices: Matrices) -> Tensor:
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
