"""Means over runs of positions that are about equally long and may overlap: adaptive pooling."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops.dispatch import (
    at_least_float32,
    fixed,
    is_symbolic,
    reference_active,
    without_autocast,
)


def adaptive_mean(x: Tensor, counts: tuple[int, int]) -> Tensor:
    """Average maps (B, C, H, W) over a grid of windows, (B, C, *counts).

    Of n positions on an axis window i is those from ``floor(i n / count)`` to below
    ``ceil((i + 1) n / count)``. Half types are computed in float32 and rounded once.
    """
    sizes = x.shape[2:]
    if (
        reference_active()
        or not torch.compiler.is_compiling()
        or is_symbolic(*sizes)
        or not any(size % count for size, count in zip(sizes, counts))
    ):
        return F.adaptive_avg_pool2d(x, counts)
    # Engines have no windows that differ; exporters would gather, mask and count them.
    dtype = at_least_float32(x)
    with without_autocast(x):
        rows, columns = (mean_matrix(n, count, x) for n, count in zip(sizes, counts))
        means = ((x.to(dtype) @ columns).mT @ rows).mT
        return means.to(x.dtype)


def mean_matrix(size: int, count: int, like: Tensor) -> Tensor:
    """Return the matrix (size, count) whose products are means over runs of `size` positions.

    It is on the device of `like` and in its type, but at least float32. The runs are those of
    :func:`adaptive_mean`; a recorded `size` may be symbolic.
    """
    dtype, device = at_least_float32(like), like.device
    if not is_symbolic(size) and not torch.jit.is_tracing():
        (matrix,) = _constant(fixed(size), count, dtype, device)
        return matrix
    place, run = torch.arange(size, device=device)[:, None], torch.arange(count, device=device)
    first, end = run * size // count, ((run + 1) * size + count - 1) // count
    inside = torch.logical_and(place >= first, place < end)  # for Core ML no `&`
    return inside.to(dtype) / (end - first).to(dtype)


@torch.compiler.assume_constant_result  # so that a graph holds it and computes nothing
def _constant(size: int, count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor]:
    # In a tuple, as PyTorch 2.14 takes all tensors that one such function gives for the same one.
    return (torch.from_numpy(_array(size, count, dtype == torch.float32)).to(device),)


@lru_cache(maxsize=64)
def _array(size: int, count: int, single: bool) -> npt.NDArray[np.floating]:
    place, run = np.arange(size)[:, None], np.arange(count)
    inside = (run * size // count <= place) & (place < -(-(run + 1) * size // count))
    return (inside / inside.sum(0)).astype(np.float32 if single else np.float64)
