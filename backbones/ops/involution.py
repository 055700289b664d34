"""Involution: kernels that differ at every position and are shared by neighboring channels.

Source: "Involution: Inverting the Inherence of Convolution for Visual Recognition" (Li et al., CVPR
2021, arXiv 2103.06255), section 3, equations 4 and 6.
"""

from itertools import product

import torch.nn.functional as F
from torch import Tensor

from backbones.errors import InputSizeError
from backbones.ops.dispatch import (
    at_least_float32,
    fixed,
    in_layout_of,
    reference_active,
    without_autocast,
)
from backbones.ops.small_kernel import Window, square, window_aggregation


def involution(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Sum the k x k neighborhood of every `stride`-th position of `x` with that position's weights.

    ``out[c, i, j] = sum_{a, b} x[c, s*i - k//2 + a, s*j - k//2 + b] * weight[g, k*a + b, i, j]``
    with ``g = c // (C/G)``, s the stride, zeros outside the map, a and b from 0 to k - 1. Weights
    are shared by C/G neighboring channels; :func:`small_kernel_aggregation` shares them by channels
    that are equal modulo their number.

    Half types are computed in float32 and rounded once.

    Args:
        x: (B, C, H, W), any memory layout.
        weight: (B, G, k*k, H', W') with k odd, C a multiple of G, and H' and W' the sizes of `x`
            divided by the stride and rounded up; its type may differ.
        stride: step from one position to the next, at least 1.

    Returns:
        (B, C, H', W') of `x`'s type and memory layout.

    Raises:
        InputSizeError: the shapes do not fit each other, k is no odd integer, or the stride is
            less than 1.
    """
    k = _check(x, weight, stride)
    dtype, groups = at_least_float32(x, weight), weight.shape[1]
    with without_autocast(x):
        # (B, C, H, W) to (B*G, C/G, H, W): what shares a kernel becomes an image of its own.
        maps = x.to(dtype).unflatten(1, (groups, -1)).flatten(0, 1)
        taps = weight.to(dtype).flatten(0, 1)  # B*G K H' W'
        if reference_active():
            out = _reference(maps, taps, k, stride)
        elif stride == 1:
            out = window_aggregation(maps, taps, square(k))
        else:
            out = _by_phases(maps, taps, k, stride)
        out = out.unflatten(0, (-1, groups)).flatten(1, 2)  # B C H' W'
        return in_layout_of(x, out).to(x.dtype)


def _check(x: Tensor, weight: Tensor, stride: int) -> int:
    if x.ndim != 4 or weight.ndim != 5:
        raise InputSizeError(
            "involution takes x (B, C, H, W) and weight (B, G, k*k, H', W'), "
            f"not {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if stride < 1:
        raise InputSizeError(f"involution: stride={stride}; it must be at least 1")
    k = round(fixed(weight.shape[2]) ** 0.5)
    if k * k != weight.shape[2] or k % 2 == 0:
        raise InputSizeError(
            f"involution: weight has {weight.shape[2]} taps; an odd kernel has k*k taps: "
            "1, 9, 25, ..."
        )
    height, width = ((size - 1) // stride + 1 for size in x.shape[2:])
    if x.shape[0] != weight.shape[0] or (height, width) != tuple(weight.shape[3:]):
        raise InputSizeError(
            f"involution: x {tuple(x.shape)} at stride {stride} needs a weight of batch "
            f"{x.shape[0]}, height {height} and width {width}, not {tuple(weight.shape)}"
        )
    if x.shape[1] % weight.shape[1]:
        raise InputSizeError(
            f"involution: {x.shape[1]} channels of x are no multiple of {weight.shape[1]} groups"
        )
    return k


def _reference(maps: Tensor, taps: Tensor, k: int, stride: int) -> Tensor:
    patches = F.unfold(maps, k, padding=k // 2, stride=stride)
    patches = patches.unflatten(1, (-1, k * k)).unflatten(3, taps.shape[2:])  # B*G C/G K H' W'
    return (patches * taps.unsqueeze(1)).sum(2)


def _by_phases(maps: Tensor, taps: Tensor, k: int, stride: int) -> Tensor:
    """Split rows and columns by their remainder; each phase is aggregated at stride 1.

    Tap a reads row ``s*i + a - k//2``, which is row ``i + (a - k//2) // s`` of the phase
    ``(a - k//2) % s``. So the taps of a phase are its window.
    """
    height, width = taps.shape[2:]
    edge = (0, stride * width - maps.shape[3], 0, stride * height - maps.shape[2])
    whole = F.pad(maps, edge)
    out = None
    for row, col in product(range(stride), repeat=2):
        rows, cols = (_taps_of_phase(k, stride, phase) for phase in (row, col))
        if not rows or not cols:
            continue
        window = Window(*(range(min(places), max(places) + 1) for places in (rows, cols)))
        chosen = [k * rows[m] + cols[n] for m, n in product(*window)]
        # Axis by axis, as Core ML has no tensors of six.
        phase = whole.unflatten(2, (height, stride))[:, :, :, row]
        phase = phase.unflatten(3, (width, stride))[..., col]
        term = window_aggregation(phase, taps[:, chosen], window)
        out = term if out is None else out + term
    assert out is not None  # the center lies in phase 0
    return out


def _taps_of_phase(k: int, stride: int, phase: int) -> dict[int, int]:
    """The taps of one direction that read a phase, by their distance in it."""
    offsets = {tap: tap - k // 2 for tap in range(k)}
    return {at // stride: tap for tap, at in offsets.items() if at % stride == phase}
