"""Small-kernel aggregation: a depthwise convolution whose kernel differs at every position.

Source: LSNet (Wang et al., CVPR 2025, arXiv 2503.23135), section 3.3, the aggregation step of
large-small convolution. Small-kernel correlation, the gradient by the kernels, compares each
position with its neighborhood: TransNeXt (Shi, CVPR 2024, arXiv 2311.17132), section 3, takes the
logits of its sliding windows so, and sums the values by aggregation.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.errors import InputSizeError
from backbones.ops.bilinear import Bilinear
from backbones.ops.dispatch import (
    at_least_float32,
    fixed,
    in_layout_of,
    is_recorded,
    is_transformed,
    reference_active,
    without_autocast,
)


class Window(NamedTuple):
    """Rows and columns of a kernel, as distances from its position; each begins at 0 or before."""

    rows: range
    cols: range

    def pads(self, width: int) -> tuple[int, int]:
        """How far the window reaches beyond both ends of a flattened map of such a width."""
        before = -self.rows.start * width - self.cols.start
        return before, max(self.rows.stop - 1, 0) * width + max(self.cols.stop - 1, 0)

    def starts(self, width: int) -> Iterator[int]:
        """Where each tap begins to read the flattened map between its pads."""
        return (r * width + c for r in range(len(self.rows)) for c in range(len(self.cols)))


def square(k: int) -> Window:
    """The window of a centered kernel, with k odd."""
    side = range(-(k // 2), k // 2 + 1)
    return Window(side, side)


def small_kernel_aggregation(x: Tensor, weight: Tensor) -> Tensor:
    """Sum each k x k neighborhood of `x` with the weights of its position.

    ``out[c, i, j] = sum_{a, b} x[c, i - k//2 + a, j - k//2 + b] * weight[c % wc, k*a + b, i, j]``
    with zeros outside the map, a and b from 0 to k - 1. Weights are shared by the channels that
    are equal modulo `wc`, not by neighboring channels.

    Half types are computed in float32 and rounded once.

    Args:
        x: (B, C, H, W), any memory layout.
        weight: (B, wc, k*k, H, W) with k odd and C a multiple of wc, or (B, k*k, H, W) for all
            channels; its type may differ.

    Returns:
        (B, C, H, W) of `x`'s type and memory layout.

    Raises:
        InputSizeError: the shapes do not fit each other, or k is no odd integer.
    """
    k = _check(x, weight.unsqueeze(1) if weight.ndim == 4 else weight)
    dtype = at_least_float32(x, weight)
    with without_autocast(x):
        return window_aggregation(x.to(dtype), weight.to(dtype), square(k)).to(x.dtype)


def window_aggregation(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """:func:`small_kernel_aggregation` with a window for a kernel.

    Args:
        x: (B, C, H, W), float32 or wider, where autocast is off.
        weight: (B, wc, K, H, W) or (B, K, H, W), of `x`'s type, K being the window's rows times
            columns.
        window: the K places that a position reads, row by row.
    """
    if is_recorded() and not reference_active():
        return _recorded(x, weight, window)
    weight = weight.unsqueeze(1) if weight.ndim == 4 else weight
    if reference_active():
        return _reference(x, weight, window)
    if _is_differentiated(x, weight) or is_transformed(x, weight):
        out: Tensor = _SmallKernel.apply(x, weight, window)
        return out
    # On small maps the autograd function itself would cost a third of the time.
    return _eager(x, weight, window)


def small_kernel_correlation(query: Tensor, key: Tensor, kernel_size: int) -> Tensor:
    """Multiply each position of `query` with the k x k neighborhood of `key`, summed over channels.

    ``out[k*a + b, i, j] = sum_c query[c, i, j] * key[c, i - k//2 + a, j - k//2 + b]`` with zeros
    outside the map, a and b from 0 to k - 1. Heads of an attention are part of the batch.

    No memory beyond the arguments, a padded map and the result. Half types are computed in float32
    and rounded once.

    Args:
        query: (B, C, H, W), any memory layout.
        key: (B, C, H, W), any memory layout; its type may differ.
        kernel_size: k, odd.

    Returns:
        (B, k*k, H, W) of `query`'s type.

    Raises:
        InputSizeError: the shapes do not fit each other, or k is no odd integer.
    """
    if query.ndim != 4 or query.shape != key.shape or kernel_size < 1 or kernel_size % 2 == 0:
        raise InputSizeError(
            "small_kernel_correlation takes query and key (B, C, H, W) and an odd kernel size, "
            f"not {tuple(query.shape)}, {tuple(key.shape)} and {kernel_size}"
        )
    dtype, window = at_least_float32(query, key), square(kernel_size)
    with without_autocast(query):
        q, k = query.to(dtype), key.to(dtype)
        if reference_active():
            out = _correlation_reference(q, k, window)
        elif is_recorded():
            out = _correlation_recorded(q, k, window)
        elif _is_differentiated(query, key) or is_transformed(query, key):
            out = _SmallKernelCorrelation.apply(q, k, window)
        else:
            out = _correlation_eager(q, k, window)
        return out.to(query.dtype)


def _is_differentiated(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def _check(x: Tensor, weight: Tensor) -> int:
    if x.ndim != 4 or weight.ndim != 5:
        raise InputSizeError(
            "small_kernel_aggregation takes x (B, C, H, W) and weight (B, wc, k*k, H, W) or "
            f"(B, k*k, H, W), not {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    k = round(fixed(weight.shape[2]) ** 0.5)
    if k * k != weight.shape[2] or k % 2 == 0:
        raise InputSizeError(
            f"small_kernel_aggregation: weight has {weight.shape[2]} taps; an odd kernel has "
            "k*k taps: 1, 9, 25, ..."
        )
    if x.shape[0] != weight.shape[0] or x.shape[2:] != weight.shape[3:]:
        raise InputSizeError(
            "small_kernel_aggregation: x and weight must agree in batch, height and width, "
            f"not {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.shape[1] % weight.shape[1]:
        raise InputSizeError(
            f"small_kernel_aggregation: {x.shape[1]} channels of x are no multiple of "
            f"{weight.shape[1]} weight groups"
        )
    return k


def _reference(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    patches = _patches(x, window).unflatten(1, (-1, weight.shape[1]))  # B C/wc wc K H W
    return (patches * weight.unsqueeze(1)).sum(3).flatten(1, 2)


def _patches(x: Tensor, window: Window) -> Tensor:
    """What each position reads, (B, C, K, H, W)."""
    rows, cols = window
    padded = F.pad(x, (-cols.start, cols.stop - 1, -rows.start, rows.stop - 1))
    patches = F.unfold(padded, (len(rows), len(cols)))
    return patches.unflatten(1, (x.shape[1], -1)).unflatten(3, x.shape[2:])


def _recorded(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """The eager path in operations that graphs have; height and width may be symbolic."""
    height, width = x.shape[2:]
    grouped = weight.ndim == 5  # else no more than four axes, as many as ncnn has
    taps = (weight * _inside_recorded(x, window)).flatten(weight.ndim - 2)
    taps = taps.transpose(1, 2) if grouped else taps  # (B, K, wc, H*W) or (B, K, H*W)
    flat = F.pad(x.flatten(2), window.pads(width))
    flat = flat.unflatten(1, (-1, weight.shape[1])) if grouped else flat
    out = None
    # One operation splits all taps, where `taps[:, tap]` is several of each.
    for start, part in zip(window.starts(width), taps.split(1, 1), strict=True):
        term = flat[..., start : start + height * width] * part
        out = term if out is None else out + term
    assert out is not None  # a window has a tap
    return (out.flatten(1, 2) if grouped else out).view_as(x)


def _inside_recorded(x: Tensor, window: Window) -> Tensor:
    """:func:`_inside` for a map `x` as operations, in its type."""
    (height, width), (rows, cols) = x.shape[2:], window
    places = torch.arange(cols.start, cols.stop, device=x.device)[:, None]
    columns = torch.arange(width, device=x.device) + places
    # (column of the kernel, column of the map); Core ML's converter knows no `&`
    inside = torch.logical_and(columns >= 0, columns < width)
    inside = inside.to(x.dtype)[None, :, None].expand(len(rows), len(cols), height, width)
    return inside.flatten(0, 1)


def _eager(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """One multiply-add per tap on the flattened map.

    There a tap is an offset, and its products run over whole maps instead of rows. An offset wraps
    around at the left and right border; at these positions the weight is set to zero.
    """
    flat, taps = _flatten(x, weight, window)
    views = _shifted(flat, x, window)
    out = torch.mul(next(views), taps[0])
    for shifted, tap in zip(views, taps[1:], strict=True):
        out.addcmul_(shifted, tap)
    return in_layout_of(x, out.view(x.shape))


class _SmallKernel(Bilinear):
    """The eager path, forward and backward."""

    recorded = staticmethod(_recorded)

    @staticmethod
    def forward(x: Tensor, weight: Tensor, window: Window) -> Tensor:
        return _eager(x, weight, window)

    @staticmethod
    def gradients(
        x: Tensor, weight: Tensor, window: Window, grad: Tensor, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        shape, groups = x.shape, weight.shape[1]
        flat, taps = _flatten(x, weight, window)
        grad_out = grad.contiguous().view(shape[0], -1, groups, shape[2] * shape[3])
        grad_x = grad_weight = None
        if needed[0]:
            grad_flat = torch.zeros_like(flat)
            for shifted, tap in zip(_shifted(grad_flat, x, window), taps, strict=True):
                shifted.addcmul_(grad_out, tap)
            before, _ = window.pads(shape[3])
            inner = grad_flat[..., before : before + shape[2] * shape[3]]
            grad_x = in_layout_of(x, inner.reshape(shape))
        if needed[1]:
            by_tap = [(shifted * grad_out).sum(1) for shifted in _shifted(flat, x, window)]
            grad_weight = torch.stack(by_tap, 2).view(weight.shape)
            _zero_wrapped(grad_weight, window)
        return grad_x, grad_weight


def _correlation_reference(query: Tensor, key: Tensor, window: Window) -> Tensor:
    return (_patches(key, window) * query.unsqueeze(2)).sum(1)


def _correlation_recorded(query: Tensor, key: Tensor, window: Window) -> Tensor:
    """The eager path in operations that graphs have; height and width may be symbolic."""
    height, width = key.shape[2:]
    maps, flat = query.flatten(2), F.pad(key.flatten(2), window.pads(width))
    starts = list(window.starts(width))
    by_tap = [(maps * flat[..., start : start + height * width]).sum(1) for start in starts]
    out = torch.stack(by_tap, 1).unflatten(2, (height, width))
    return out * _inside_recorded(query, window)


def _correlation_eager(query: Tensor, key: Tensor, window: Window) -> Tensor:
    """One multiply-add per channel, of all taps at once, on the flattened map.

    As in :func:`_eager`, what wraps around is set to zero.
    """
    batch, channels, height, width = query.shape
    size, sides = height * width, (len(window.rows), len(window.cols))
    maps = query.contiguous().view(batch, channels, 1, 1, size)
    flat = F.pad(key.contiguous().view(batch, channels, size), window.pads(width))
    shape, stride = (batch, channels, *sides, size), flat.stride()
    windows = flat.as_strided(shape, (*stride[:2], width, 1, 1))  # (B, C, row, column, H*W)
    out = query.new_zeros(batch, *sides, size)
    for channel in range(channels):
        out.addcmul_(windows[:, channel], maps[:, channel])
    out = out.view(batch, -1, height, width)
    _zero_wrapped(out.unsqueeze(1), window)
    return out


class _SmallKernelCorrelation(Bilinear):
    """The eager path, forward and backward; the gradients are those of aggregation."""

    recorded = staticmethod(_correlation_recorded)

    @staticmethod
    def forward(query: Tensor, key: Tensor, window: Window) -> Tensor:
        return _correlation_eager(query, key, window)

    @staticmethod
    def gradients(
        query: Tensor, key: Tensor, window: Window, grad: Tensor, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        weight = grad.unsqueeze(1)
        of_query = _eager(key, weight, window) if needed[0] else None
        of_key, _ = _SmallKernel.gradients(key, weight, window, query, (needed[1], False))
        return of_query, of_key


def _flatten(x: Tensor, weight: Tensor, window: Window) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The map as (B, C/wc, wc, H*W and its pads); per tap (B, 1, wc, H*W) weights."""
    batch, channels, height, width = x.shape
    groups, size = weight.shape[1], height * width
    if weight.device.type == "cpu":
        inside = torch.from_numpy(_inside(window, height, width, weight.dtype == torch.float32))
        masked = weight.contiguous() * inside
    else:  # a table would have to be sent there
        masked = weight.clone(memory_format=torch.contiguous_format)
        _zero_wrapped(masked, window)
    # Of four axes, padding would keep the layout that a map of one position seems to have.
    flat = F.pad(x.contiguous().view(batch, channels, size), window.pads(width))
    taps = masked.view(batch, 1, groups, -1, size).unbind(3)
    return flat.view(batch, channels // groups, groups, -1), taps


def _shifted(flat: Tensor, x: Tensor, window: Window) -> Iterator[Tensor]:
    """Views (B, C/wc, wc, H*W) of the flattened map of `x`, one a tap."""
    height, width = x.shape[2:]
    shape, stride = (*flat.shape[:3], height * width), flat.stride()
    for start in window.starts(width):
        yield flat.as_strided(shape, stride, start)


@lru_cache(maxsize=64)
def _inside(window: Window, height: int, width: int, single: bool) -> npt.NDArray[np.floating]:
    """1 where a tap's column lies inside the map, else 0, (K, H, W); float32 if `single`."""
    column = np.arange(width) + np.arange(window.cols.start, window.cols.stop)[:, None]
    inside = ((column >= 0) & (column < width)).astype(np.float32 if single else np.float64)
    inside = np.tile(inside[:, None], (len(window.rows), height, 1))
    return inside.reshape(-1, height, width)


def _zero_wrapped(weight: Tensor, window: Window) -> None:
    """Zero, in place, the weights whose column lies outside the map, left and right."""
    by_col = weight.unflatten(2, (-1, len(window.cols)))
    for place, col in enumerate(window.cols):
        if col:
            out = slice(None, -col) if col < 0 else slice(max(weight.shape[4] - col, 0), None)
            by_col[:, :, :, place, :, out].zero_()
