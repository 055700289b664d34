"""Spectral filter: multiply a map's two-dimensional spectrum with learned complex numbers.

Source: HorNet (Rao et al., NeurIPS 2022, arXiv 2207.14284), section 3.1, the global filter of
HorNet-GF, after Global Filter Networks (Rao et al., NeurIPS 2021, arXiv 2107.00645), section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor

from backbones.errors import InputSizeError
from backbones.ops.dispatch import (
    at_least_float32,
    is_recorded,
    is_symbolic,
    reference_active,
    without_autocast,
)
from backbones.ops.fourier import Dense, Separable, dense, separable

# On the CPU matrix products beat the fast Fourier transform up to this map side, and one matrix
# for both axes beats one for each up to this many positions (scripts/measure_ops.py).
_MATRIX_SIDE = 32
_DENSE_POSITIONS = 144


@register_notrace_function
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
        if reference_active() or not _matrices_pay(x):
            out = _reference(signal, filter_)
        else:
            size = (int(height), int(width))  # torch.jit.trace hands out tensors for sizes
            single = dtype == torch.float32
            if size[0] * size[1] <= _DENSE_POSITIONS:
                out = _by_one_matrix(signal, filter_, dense(*size, single))
            else:
                out = _axis_by_axis(signal, filter_, separable(*size, single))
        return out.to(x.dtype)


def resize_filter(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a filter (C, h, w, 2) to the half spectrum of a map of `size` (H, W).

    Real and imaginary part separately, bilinear, corners aligned, over the two frequency axes in
    the transform's own order (not shifted), as the authors' code does for other input sizes.

    Returns:
        (C, H, W//2 + 1, 2); `weight` itself if it has this shape.
    """
    bins = (size[0], size[1] // 2 + 1)
    if not is_symbolic(*size) and weight.shape[1:3] == bins:
        return weight
    parts = weight.permute(3, 0, 1, 2)
    parts = F.interpolate(parts, size=bins, mode="bilinear", align_corners=True)
    return parts.permute(1, 2, 3, 0)


def _matrices_pay(x: Tensor) -> bool:
    if is_symbolic(*x.shape[2:]):
        return False  # the matrices need sizes
    if is_recorded():
        return True  # compilers and inference engines handle complex numbers badly or not at all
    # Accelerators may compute float32 products in a shorter type; their transform never does.
    return x.device.type in ("cpu", "meta") and max(x.shape[2:]) <= _MATRIX_SIDE


def _reference(x: Tensor, weight: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(weight.contiguous())
    return torch.fft.irfft2(spectrum, s=x.shape[2:], norm="ortho")


def _by_one_matrix(x: Tensor, weight: Tensor, table: Dense) -> Tensor:
    batch, channels = x.shape[:2]
    forward, back = _tensors(x, table.forward, table.back)
    spectrum = (x.flatten(2) @ forward).view(batch, *weight.shape)
    return (_filtered(spectrum, weight).view(batch, channels, -1) @ back).view(x.shape)


def _axis_by_axis(x: Tensor, weight: Tensor, table: Separable) -> Tensor:
    batch, channels, height, width = x.shape
    half = height // 2 + 1
    down, across, back_across, back_down = _tensors(x, *table[:4])
    (rows,) = _tensors(x, table.rows)
    waves = (down @ x).view(batch, channels, half, 2 * width)
    weight = weight.index_select(1, rows)
    spectrum = (waves @ across).view(batch, *weight.shape)
    waves = _filtered(spectrum, weight).view(batch, channels, half, -1) @ back_across
    return back_down @ waves.view(batch, channels, 2 * half, width)


def _filtered(spectrum: Tensor, weight: Tensor) -> Tensor:
    """The complex product of (..., 2) tensors."""
    if not is_recorded():
        product = torch.view_as_complex(spectrum) * torch.view_as_complex(weight.contiguous())
        return torch.view_as_real(product)
    (a, b), (c, d) = spectrum.unbind(-1), weight.unbind(-1)
    return torch.stack([a * c - b * d, a * d + b * c], -1)


def _tensors(x: Tensor, *arrays: object) -> list[Tensor]:
    # A recorded graph needs copies of its own; otherwise the tensors share the tables' memory.
    make = torch.tensor if is_recorded() or type(x) is not Tensor else torch.from_numpy
    return [make(array).to(x.device) for array in arrays]
