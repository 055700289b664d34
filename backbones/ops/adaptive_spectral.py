"""Adaptive spectral filter: multiply a map's spectrum with a mask that is computed from it.

Source: "Adaptive Frequency Filters As Efficient Global Token Mixers" (Huang et al., ICCV 2023,
arXiv 2307.14008), the token mixer.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
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
from backbones.ops.fourier import dense, separable

# As for `spectral_filter`: up to so many positions one matrix for both axes beats one for each; up
# to the side, products beat the fast transform on the CPU.
_DENSE_POSITIONS = 144
_MATRIX_SIDE = 47

Mask = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Matrices = tuple[Tensor, ...]


def adaptive_spectral_filter(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    act: str = "silu",
    threshold: float = 0.01,
) -> Tensor:
    """Filter `x` by a mask of its own spectrum S: ``irfft2(m(S) * S)``, orthonormal transforms.

    With z the real parts of a group's channels and then the imaginary ones, the mask is
    ``m = shrink(W2 act(W1 z + b1) + b2)`` at every frequency: its own real parts and imaginary
    ones. ``shrink`` brings each number nearer to zero by the threshold. The product is one of
    complex numbers. It need not be the spectrum of a real map: as in ``irfft2``, the imaginary
    parts that the transform of a real row has not are left out after the transform of columns.

    All is computed in float32 for half types (also under autocast), in float64 for float64.

    Args:
        x: (B, C, H, W), real, of any size.
        w1: (2C, 2C/G, 1, 1), a convolution of G groups.
        b1: (2C,), its bias.
        w2: like `w1`.
        b2: like `b1`.
        act: the activation, by its name in ``torch.nn.functional``.
        threshold: of ``shrink``.

    Returns:
        (B, C, H, W) of `x`'s type.

    Raises:
        InputSizeError: the shapes do not fit each other.
    """
    _check(x, w1, b1, w2, b2)
    dtype = at_least_float32(x, w1)
    layers = [layer.to(dtype) for layer in (w1, b1, w2, b2)]
    mask = partial(_mask, layers=layers, act=act, threshold=threshold)
    with without_autocast(x):
        return _by_context(x.to(dtype), mask).to(x.dtype)


def _check(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
    weights = [tuple(map(fixed, one.shape)) for one in (w1, w2)]
    biases = [tuple(map(fixed, one.shape)) for one in (b1, b2)]
    wide = 2 * fixed(x.shape[1]) if x.ndim == 4 else 0
    inputs = weights[0][1] if w1.ndim == 4 else 0
    fit = weights == [(wide, inputs, 1, 1)] * 2 and biases == [(wide,)] * 2
    if inputs < 2 or wide % inputs or not fit:
        raise InputSizeError(
            "adaptive_spectral_filter takes x (B, C, H, W), weights (2C, 2C/G, 1, 1) and biases"
            f" (2C,), not {tuple(x.shape)}, {weights} and {biases}"
        )


def _by_context(x: Tensor, mask: Mask) -> Tensor:
    if reference_active():
        return _by_transform(x, mask)
    height, width = (fixed(side) for side in x.shape[2:])
    single, recorded = x.dtype == torch.float32, is_recorded()
    device = x.device.type
    if device == "cpu" and type(x) is Tensor and not recorded:
        # MKL's transform refuses an empty batch on some processors.
        if max(height, width) <= _MATRIX_SIDE or x.numel() == 0:
            return _by_matrices(x, mask, _matrices_of_tensors(height, width, single))
    # Compilers and inference engines handle complex numbers badly or not at all; counters of
    # multiply-adds know products but no transforms.
    elif recorded or device in ("cpu", "meta"):
        matrices = _matrices(height, width, single)
        return _by_matrices(x, mask, tuple(matrix.to(x.device) for matrix in matrices))
    return _by_transform(x, mask)


def _mask(
    real: Tensor, imaginary: Tensor, layers: list[Tensor], act: str, threshold: float
) -> tuple[Tensor, Tensor]:
    """Return both parts of the mask for those of a spectrum, all (B, C, h, w)."""
    w1, b1, w2, b2 = layers
    groups = w1.shape[0] // w1.shape[1]
    parts = (part.unflatten(1, (groups, -1)) for part in (real, imaginary))  # B G C/G h w
    z = torch.cat(tuple(parts), 2).flatten(1, 2)  # B 2C h w; Core ML has no tensors of six axes
    z = getattr(F, act)(F.conv2d(z, w1, b1, groups=groups))
    z = F.conv2d(z, w2, b2, groups=groups)
    z = z - z.clamp(-threshold, threshold)
    real, imaginary = z.unflatten(1, (groups, -1)).chunk(2, 2)  # B G C/G h w
    return real.flatten(1, 2), imaginary.flatten(1, 2)


def _by_transform(x: Tensor, mask: Mask) -> Tensor:
    width = x.shape[3]
    spectrum = torch.fft.rfft2(x, norm="ortho")  # B C H w
    spectrum = torch.complex(*mask(spectrum.real, spectrum.imag)) * spectrum
    waves = torch.fft.ifft(spectrum, dim=2, norm="ortho")
    # Libraries promise nothing for the imaginary parts that the spectrum of a real row has not.
    frequency = torch.arange(width // 2 + 1, device=x.device)
    has_imaginary = (frequency > 0) & (2 * frequency < width)
    waves = torch.complex(waves.real, waves.imag * has_imaginary)
    return torch.fft.irfft(waves, n=width, dim=3, norm="ortho")


def _by_matrices(x: Tensor, mask: Mask, matrices: Matrices) -> Tensor:
    to_real, to_imaginary, from_real, from_imaginary, *vertical = matrices
    batch, channels, height, width = x.shape
    if vertical:
        down, back_down = vertical
        waves = (down @ x).reshape(batch, channels, height // 2 + 1, 2 * width)
    else:
        waves = x.reshape(batch, channels, height * width)  # LiteRT's converter fails on 1 row
    a, b = waves @ to_real, waves @ to_imaginary
    maps = (a, b) if vertical else (a.unsqueeze(2), b.unsqueeze(2))
    p, q = (part.reshape(a.shape) for part in mask(*maps))
    waves = (p * a - q * b) @ from_real + (p * b + q * a) @ from_imaginary
    if vertical:
        waves = back_down @ waves.reshape(batch, channels, 2 * (height // 2 + 1), width)
    return waves.reshape(x.shape)


@torch.compiler.assume_constant_result  # so that a compiled graph holds them and computes nothing
def _matrices(height: int, width: int, single: bool) -> Matrices:
    """Return matrices to and from real and imaginary parts; of the vertical axis where apart."""
    if height * width <= _DENSE_POSITIONS:
        forward, _, back = dense(height, width, single)
        vertical = []
    else:
        down, forward, _, back, back_down, _ = separable(height, width, single)
        vertical = [down, back_down]
    arrays = [forward[:, 0::2], forward[:, 1::2], back[0::2], back[1::2], *vertical]
    return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)


@lru_cache(maxsize=64)
def _matrices_of_tensors(height: int, width: int, single: bool) -> Matrices:
    with torch.inference_mode(False):  # or no later call could be differentiated
        return _matrices(height, width, single)
