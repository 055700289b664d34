"""Involution: kernels that differ at every position and are shared by neighboring channels.

Source: "Involution: Inverting the Inherence of Convolution for Visual Recognition" (Li et al., CVPR
2021, arXiv 2103.06255), section 3, equations 4 and 6.
"""

from torch import Tensor

from backbones.errors import InputSizeError
from backbones.ops.dispatch import (
    at_least_float32,
    fixed,
    in_layout_of,
    without_autocast,
)
from backbones.ops.small_kernel import Kernel, strided_aggregation


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
    dtype = at_least_float32(x, weight)
    with without_autocast(x):
        out = strided_aggregation(x.to(dtype), weight.to(dtype), Kernel(k, stride), neighbors=True)
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
