"""Real matrices that compute two-dimensional discrete Fourier transforms of real maps.

Small transforms are faster as matrix products than as fast Fourier transforms, and products need
no complex numbers, which inference engines lack. Matrices are computed in float64 with arguments
reduced to one turn, by numpy: a table then belongs to no device, and computing it is never
recorded by whoever traces the model.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]


class Separable(NamedTuple):
    """Matrices of the transform axis by axis, for maps of H x W; h = H//2 + 1, w = W//2 + 1.

    The vertical transform uses that the map is real: its cosines and sines for frequencies 0 to
    H/2 hold everything. The horizontal product then gives the spectrum's rows u and -u together.
    """

    down: Array  # (2h, H): cosine and sine of every vertical frequency
    across: Array  # (2W, 4w): [cosine row | sine row] -> (row u or -u, frequency, real/imaginary)
    across_turned: Array  # the same for i times the spectrum
    back_across: Array  # (4w, 2W)
    back_down: Array  # (H, 2h)
    rows: npt.NDArray[np.int64]  # (2h,): the spectrum's row of each (frequency, u or -u)


class Dense(NamedTuple):
    """The whole transform as one matrix each way; spectra are (H, w, real/imaginary)."""

    forward: Array  # (H*W, 2*H*w)
    forward_turned: Array  # the same for i times the spectrum
    back: Array  # (2*H*w, H*W)


class Horizontal(NamedTuple):
    """Matrices of the transform of rows, scaled for both axes; columns remain to be transformed."""

    across: Array  # (W, 2w): the pairs are real and imaginary part
    back_across: Array  # (2w, W)


def _waves(length: int, frequencies: int) -> tuple[Array, Array]:
    """Cosines and sines, (frequencies, length), of exactly reduced arguments."""
    turns = np.outer(np.arange(frequencies), np.arange(length)) % length
    angles = turns * (2 * np.pi / length)
    return np.cos(angles), np.sin(angles)


def _multiplicity(length: int) -> Array:
    """How many of all frequencies each of the first length//2 + 1 stands for: 1 or 2."""
    counts = np.full(length // 2 + 1, 2.0)
    counts[0] = 1.0
    if length % 2 == 0:
        counts[-1] = 1.0
    return counts


@lru_cache(maxsize=64)
def separable(height: int, width: int, single: bool) -> Separable:
    """Orthonormal separable transform; float32 matrices if `single`, else float64."""
    h, w = height // 2 + 1, width // 2 + 1
    cos_u, sin_u = _waves(height, h)
    cos_v, sin_v = (wave.T for wave in _waves(width, w))  # (W, w)
    down = np.stack([cos_u, sin_u], 1)  # (h, 2, H)
    # exp(-i(u + v)) = (cos u - i sin u)(cos v - i sin v); for row -u the sign of sin u changes.
    from_cos = np.stack([cos_v, -sin_v], -1)  # (W, w, real/imaginary)
    from_sin = np.stack([-sin_v, -cos_v], -1)
    across = np.stack(
        [np.stack([from_cos, from_cos], 1), np.stack([from_sin, -from_sin], 1)]
    )  # (cosine/sine, W, u or -u, w, real/imaginary)
    across *= (height * width) ** -0.5
    back = across * _multiplicity(width)[:, None]
    # Where u and -u are the same row, both copies of it come back: each counts half.
    back_down = down * (_multiplicity(height) / 2)[:, None, None]
    frequency = np.arange(h)
    rows = np.stack([frequency, -frequency % height], 1).reshape(-1)
    return Separable(
        _finish(down.reshape(2 * h, height), single),
        _finish(across.reshape(2 * width, 4 * w), single),
        _finish(_turned(across).reshape(2 * width, 4 * w), single),
        _finish(back.reshape(2 * width, 4 * w).T, single),
        _finish(back_down.reshape(2 * h, height).T, single),
        rows,
    )


@lru_cache(maxsize=64)
def dense(height: int, width: int, single: bool) -> Dense:
    """Orthonormal transform as one matrix; float32 if `single`, else float64."""
    w = width // 2 + 1
    cos_u, sin_u = _waves(height, height)
    cos_v, sin_v = _waves(width, w)
    # (H, W | H, w): the angle u*y + v*x by the addition theorems.
    cosine = np.einsum("uy,vx->yxuv", cos_u, cos_v) - np.einsum("uy,vx->yxuv", sin_u, sin_v)
    sine = np.einsum("uy,vx->yxuv", sin_u, cos_v) + np.einsum("uy,vx->yxuv", cos_u, sin_v)
    forward = np.stack([cosine, -sine], -1) * (height * width) ** -0.5
    back = forward * _multiplicity(width)[:, None]
    shape = (height * width, 2 * height * w)
    return Dense(
        _finish(forward.reshape(shape), single),
        _finish(_turned(forward).reshape(shape), single),
        _finish(back.reshape(shape).T, single),
    )


@lru_cache(maxsize=64)
def horizontal(height: int, width: int, single: bool) -> Horizontal:
    """Transform of rows that makes an unscaled one of columns orthonormal; types as above."""
    w = width // 2 + 1
    cos_v, sin_v = (wave.T for wave in _waves(width, w))
    across = np.stack([cos_v, -sin_v], -1) * (height * width) ** -0.5
    back = across * _multiplicity(width)[:, None]
    return Horizontal(
        _finish(across.reshape(width, 2 * w), single),
        _finish(back.reshape(width, 2 * w).T, single),
    )


@lru_cache(maxsize=64)
def low_waves(height: int, width: int, radius: int, single: bool) -> Array:
    """Real waves (K, H*W) of the bins in :func:`disc`, products of one for each axis.

    They are orthonormal where a map has them; what a small map lacks is zero, and a bin that is its
    own negative has its cosine once.
    """
    rows, columns, _ = disc(radius)
    down, across = _low_axis(height, radius)[rows], _low_axis(width, radius)[columns]
    waves = down[:, :, None] * across[:, None, :]
    return _finish(waves.reshape(len(rows), height * width), single)


def disc(radius: int) -> tuple[list[int], list[int], list[bool]]:
    """Vertical and horizontal wave of each product within `radius` bins, and if it is on the edge.

    Waves of an axis are the constant, then cosine and sine of one turn, of two turns and so on.
    """
    waves = range(2 * radius + 1)
    found = [(i, j, ((i + 1) // 2) ** 2 + ((j + 1) // 2) ** 2) for i in waves for j in waves]
    found = [one for one in found if one[2] <= radius**2]
    return (
        [i for i, _, _ in found],
        [j for _, j, _ in found],
        [distance == radius**2 for _, _, distance in found],
    )


def _low_axis(length: int, radius: int) -> Array:
    """Waves of up to `radius` turns, (2 * radius + 1, length), scaled for :func:`low_waves`."""
    cosine, sine = _waves(length, radius + 1)
    orders = np.arange(1, radius + 1)
    counts = np.clip(length + 1 - 2 * orders, 0, 2)  # which of a frequency and its negative exist
    pairs = np.stack([cosine[1:], sine[1:]], 1) * np.sqrt(counts)[:, None, None]
    return np.concatenate([cosine[:1], pairs.reshape(2 * radius, length)]) * length**-0.5


def _turned(matrix: Array) -> Array:
    """Return the matrix (..., real/imaginary) that gives i times what this one gives."""
    return np.stack([-matrix[..., 1], matrix[..., 0]], -1)


def _finish(matrix: Array, single: bool) -> Array:
    return np.ascontiguousarray(matrix, dtype=np.float32 if single else np.float64)
