"""Attentive convolution: a depthwise convolution whose kernels belong to each image.

Source: "Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional
Efficiency" (Yu et al., arXiv 2510.20092).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.errors import InputSizeError
from backbones.ops.dispatch import (
    at_least_float32,
    fixed,
    in_layout_of,
    is_recorded,
    is_transformed,
    reference_active,
    without_autocast,
)


def attentive_convolution(x: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each channel of each image with a kernel of its own.

    ``out[n, c, i, j] = sum_{a, b} x[n, c, i - k//2 + a, j - k//2 + b] * kernels[n, c, a, b]`` with
    zeros outside the map, a and b from 0 to k - 1; a cross-correlation, as ``conv2d`` is. It is
    linear in both arguments.

    Half types are computed in float32 and rounded once.

    Args:
        x: (B, C, H, W), any memory layout.
        kernels: (B, C, k, k) with k odd; its type may differ.

    Returns:
        (B, C, H, W) of `x`'s type and memory layout.

    Raises:
        InputSizeError: the shapes do not fit each other, or the kernels are not square and odd.
    """
    k = _check(x, kernels)
    dtype = at_least_float32(x, kernels)
    with without_autocast(x):
        wide, taps = x.to(dtype), kernels.to(dtype)
        if reference_active():
            out = _reference(wide, taps, k)
        elif is_recorded() or is_transformed(x, kernels):
            out = _shifted_sum(wide, taps, k)
        else:
            eager = _grouped if _is_one_call(wide) else _shifted_sum
            out = in_layout_of(x, eager(wide, taps, k))
        return out.to(x.dtype)


def _check(x: Tensor, kernels: Tensor) -> int:
    if x.ndim != 4 or kernels.ndim != 4:
        raise InputSizeError(
            "attentive_convolution takes x (B, C, H, W) and kernels (B, C, k, k), "
            f"not {tuple(x.shape)} and {tuple(kernels.shape)}"
        )
    if x.shape[:2] != kernels.shape[:2]:
        raise InputSizeError(
            "attentive_convolution: x and kernels must agree in batch and channels, "
            f"not {tuple(x.shape)} and {tuple(kernels.shape)}"
        )
    height, width = map(fixed, kernels.shape[2:])
    if height != width or height % 2 == 0:
        raise InputSizeError(
            f"attentive_convolution: kernels of {height} x {width}; they must be square with an "
            "odd side: 1, 3, 5, ..."
        )
    return height


def _reference(x: Tensor, kernels: Tensor, k: int) -> Tensor:
    patches = F.unfold(x, k, padding=k // 2).unflatten(1, (-1, k * k))  # B C k*k H*W
    return (patches * kernels.flatten(2).unsqueeze(-1)).sum(2).view(x.shape)


def _shifted_sum(x: Tensor, kernels: Tensor, k: int) -> Tensor:
    """One multiply-add per tap; batch, height and width may be symbolic."""
    height, width = x.shape[2:]
    padded = F.pad(x, (k // 2,) * 4)
    out = None
    for a in range(k):
        rows = padded[:, :, a : a + height]
        for b in range(k):
            term = rows[..., b : b + width] * kernels[:, :, a, b, None, None]
            out = term if out is None else out + term
    assert out is not None  # k >= 1
    return out


def _grouped(x: Tensor, kernels: Tensor, k: int) -> Tensor:
    """Images and channels as groups of one convolution.

    A graph of it would hold for one batch size only.
    """
    maps = x.reshape(1, -1, *x.shape[2:])  # 1 B*C H W
    weight = kernels.reshape(-1, 1, k, k)
    return F.conv2d(maps, weight, padding=k // 2, groups=len(weight)).view(x.shape)


def _is_one_call(x: Tensor) -> bool:
    """Whether a depthwise convolution has a kernel of its own; else PyTorch goes group by group."""
    if x.numel() == 0:
        return False
    return x.device.type != "cpu" or (
        x.dtype == torch.float32 and bool(torch.backends.mkldnn.enabled)
    )
