"""Small-kernel aggregation: a depthwise convolution whose kernel differs at every position.

Source: LSNet (Wang et al., CVPR 2025, arXiv 2503.23135), section 3.3, the aggregation step of
large-small convolution. Small-kernel correlation, the gradient by the kernels, compares each
position with its neighborhood: TransNeXt (Shi, CVPR 2024, arXiv 2311.17132), section 3, takes the
logits of its sliding windows so, and sums the values by aggregation.
"""

from collections.abc import Iterator
from functools import lru_cache

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
    whole = weight.unsqueeze(1) if weight.ndim == 4 else weight
    k = _check(x, whole)
    dtype = at_least_float32(x, weight)
    with without_autocast(x):
        if is_recorded() and not reference_active():
            return _recorded(x.to(dtype), weight.to(dtype), k).to(x.dtype)
        weight = whole
        if reference_active():
            out = _reference(x.to(dtype), weight.to(dtype), k)
        elif _is_differentiated(x, weight) or is_transformed(x, weight):
            out = _SmallKernel.apply(x.to(dtype), weight.to(dtype), k)
        else:  # on small maps the autograd function itself would cost a third of the time
            out = _eager(x.to(dtype), weight.to(dtype), k)
        return out.to(x.dtype)


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
    dtype = at_least_float32(query, key)
    with without_autocast(query):
        q, k = query.to(dtype), key.to(dtype)
        if reference_active():
            out = _correlation_reference(q, k, kernel_size)
        elif is_recorded():
            out = _correlation_recorded(q, k, kernel_size)
        elif _is_differentiated(query, key) or is_transformed(query, key):
            out = _SmallKernelCorrelation.apply(q, k, kernel_size)
        else:
            out = _correlation_eager(q, k, kernel_size)
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


def _reference(x: Tensor, weight: Tensor, k: int) -> Tensor:
    groups = weight.shape[1]
    patches = F.unfold(x, k, padding=k // 2)
    patches = patches.view(x.shape[0], x.shape[1] // groups, groups, k * k, *x.shape[2:])
    return (patches * weight.unsqueeze(1)).sum(3).view(x.shape)


def _recorded(x: Tensor, weight: Tensor, k: int) -> Tensor:
    """The eager path in operations that graphs have; height and width may be symbolic."""
    (height, width), edge = x.shape[2:], k // 2 * (x.shape[3] + 1)
    grouped = weight.ndim == 5  # else no more than four axes, as many as ncnn has
    taps = (weight * _inside_recorded(x, k)).flatten(weight.ndim - 2)
    taps = taps.transpose(1, 2) if grouped else taps  # (B, K, wc, H*W) or (B, K, H*W)
    flat = F.pad(x.flatten(2), (edge, edge))
    flat = flat.unflatten(1, (-1, weight.shape[1])) if grouped else flat
    out = None
    for tap, part in enumerate(taps.split(1, 1)):  # one operation, where `taps[:, tap]` is several
        row, col = divmod(tap, k)
        start = row * width + col
        term = flat[..., start : start + height * width] * part
        out = term if out is None else out + term
    assert out is not None  # k >= 1
    return (out.flatten(1, 2) if grouped else out).view_as(x)


def _inside_recorded(x: Tensor, k: int) -> Tensor:
    """:func:`_inside` for a map `x` as operations, in its type."""
    (height, width), pad = x.shape[2:], k // 2
    columns = (
        torch.arange(width, device=x.device) + torch.arange(-pad, pad + 1, device=x.device)[:, None]
    )
    # (column of the kernel, column of the map); Core ML's converter knows no `&`
    inside = torch.logical_and(columns >= 0, columns < width)
    return inside.to(x.dtype)[None, :, None].expand(k, k, height, width).flatten(0, 1)


def _eager(x: Tensor, weight: Tensor, k: int) -> Tensor:
    """One multiply-add per tap on the flattened map.

    There a tap is an offset, and its products run over whole maps instead of rows. An offset wraps
    around at the left and right border; at these positions the weight is set to zero.
    """
    flat, taps = _flatten(x, weight, k)
    views = _shifted(flat, x.shape[3], k)
    out = torch.mul(next(views), taps[0])
    for shifted, tap in zip(views, taps[1:], strict=True):
        out.addcmul_(shifted, tap)
    return in_layout_of(x, out.view(x.shape))


class _SmallKernel(Bilinear):
    """The eager path, forward and backward."""

    recorded = staticmethod(_recorded)

    @staticmethod
    def forward(x: Tensor, weight: Tensor, k: int) -> Tensor:
        return _eager(x, weight, k)

    @staticmethod
    def gradients(
        x: Tensor, weight: Tensor, k: int, grad: Tensor, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        shape, groups = x.shape, weight.shape[1]
        flat, taps = _flatten(x, weight, k)
        grad_out = grad.contiguous().view(shape[0], -1, groups, shape[2] * shape[3])
        grad_x = grad_weight = None
        if needed[0]:
            grad_flat = torch.zeros_like(flat)
            for shifted, tap in zip(_shifted(grad_flat, shape[3], k), taps, strict=True):
                shifted.addcmul_(grad_out, tap)
            edge = k // 2 * (shape[3] + 1)
            inner = grad_flat[..., edge : edge + shape[2] * shape[3]]
            grad_x = in_layout_of(x, inner.reshape(shape))
        if needed[1]:
            by_tap = [(shifted * grad_out).sum(1) for shifted in _shifted(flat, shape[3], k)]
            grad_weight = torch.stack(by_tap, 2).view(weight.shape)
            _zero_wrapped(grad_weight, k)
        return grad_x, grad_weight


def _correlation_reference(query: Tensor, key: Tensor, k: int) -> Tensor:
    patches = F.unfold(key, k, padding=k // 2).view(*key.shape[:2], k * k, *key.shape[2:])
    return (patches * query.unsqueeze(2)).sum(1)


def _correlation_recorded(query: Tensor, key: Tensor, k: int) -> Tensor:
    """The eager path in operations that graphs have; height and width may be symbolic."""
    height, width = key.shape[2:]
    edge, size = k // 2 * (width + 1), height * width
    maps, flat = query.flatten(2), F.pad(key.flatten(2), (edge, edge))
    starts = [row * width + col for row in range(k) for col in range(k)]
    by_tap = [(maps * flat[..., start : start + size]).sum(1) for start in starts]
    out = torch.stack(by_tap, 1).unflatten(2, (height, width))
    return out * _inside_recorded(query, k)


def _correlation_eager(query: Tensor, key: Tensor, k: int) -> Tensor:
    """One multiply-add per channel, of all taps at once, on the flattened map.

    As in :func:`_eager`, what wraps around is set to zero.
    """
    batch, channels, height, width = query.shape
    edge = k // 2 * (width + 1)
    maps = query.contiguous().view(batch, channels, 1, 1, height * width)
    flat = F.pad(key.contiguous().view(batch, channels, height * width), (edge, edge))
    shape, stride = (*maps.shape[:2], k, k, height * width), flat.stride()
    windows = flat.as_strided(shape, (*stride[:2], width, 1, 1))  # (B, C, row, column, H*W)
    out = query.new_zeros(batch, k, k, height * width)
    for channel in range(channels):
        out.addcmul_(windows[:, channel], maps[:, channel])
    out = out.view(batch, k * k, height, width)
    _zero_wrapped(out.unsqueeze(1), k)
    return out


class _SmallKernelCorrelation(Bilinear):
    """The eager path, forward and backward; the gradients are those of aggregation."""

    recorded = staticmethod(_correlation_recorded)

    @staticmethod
    def forward(query: Tensor, key: Tensor, k: int) -> Tensor:
        return _correlation_eager(query, key, k)

    @staticmethod
    def gradients(
        query: Tensor, key: Tensor, k: int, grad: Tensor, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        weight = grad.unsqueeze(1)
        of_query = _eager(key, weight, k) if needed[0] else None
        of_key, _ = _SmallKernel.gradients(key, weight, k, query, (needed[1], False))
        return of_query, of_key


def _flatten(x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The map as (B, C/wc, wc, e + H*W + e) with zero ends; per tap (B, 1, wc, H*W) weights."""
    batch, channels, height, width = x.shape
    groups, size = weight.shape[1], height * width
    edge = k // 2 * (width + 1)
    if weight.device.type == "cpu":
        inside = torch.from_numpy(_inside(k, height, width, weight.dtype == torch.float32))
        masked = weight.contiguous() * inside
    else:  # a table would have to be sent there
        masked = weight.clone(memory_format=torch.contiguous_format)
        _zero_wrapped(masked, k)
    # Of four axes, padding would keep the layout that a map of one position seems to have.
    flat = F.pad(x.contiguous().view(batch, channels, size), (edge, edge))
    taps = masked.view(batch, 1, groups, k * k, size).unbind(3)
    return flat.view(batch, channels // groups, groups, -1), taps


def _shifted(flat: Tensor, width: int, k: int) -> Iterator[Tensor]:
    """Views (B, C/wc, wc, H*W) of the flattened map, one a tap."""
    length = flat.shape[3] - 2 * (k // 2) * (width + 1)
    shape, stride = (*flat.shape[:3], length), flat.stride()
    for row in range(0, k * width, width):
        for col in range(k):
            yield flat.as_strided(shape, stride, row + col)


@lru_cache(maxsize=64)
def _inside(k: int, height: int, width: int, single: bool) -> npt.NDArray[np.floating]:
    """1 where a tap's column lies inside the map, else 0, (k*k, H, W); float32 if `single`."""
    column = np.arange(width) + np.arange(-(k // 2), k // 2 + 1)[:, None]
    inside = ((column >= 0) & (column < width)).astype(np.float32 if single else np.float64)
    return np.tile(inside[:, None], (k, height, 1)).reshape(k * k, height, width)


def _zero_wrapped(weight: Tensor, k: int) -> None:
    """Zero, in place, the weights whose column lies outside the map, left and right."""
    batch, channels, _, height, width = weight.shape
    size = height * width
    for col in range(k // 2):  # the kernel's column; its mirror image is k - 1 - col
        for j in range(min(k // 2 - col, width)):
            # The second axis steps from (col, j) to (k - 1 - col, width - 1 - j).
            step = (k - 1 - 2 * col) * size + width - 1 - 2 * j
            shape, stride = (batch * channels * k, 2, height), (k * size, step, width)
            weight.as_strided(shape, stride, col * size + j).zero_()
