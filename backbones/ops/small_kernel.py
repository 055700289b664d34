"""Small-kernel aggregation: a depthwise convolution whose kernel differs at every position.

Source: LSNet (Wang et al., CVPR 2025, arXiv 2503.23135), section 3.3, the aggregation step of
large-small convolution. Small-kernel correlation, the gradient by the kernels, compares each
position with its neighborhood: TransNeXt (Shi, CVPR 2024, arXiv 2311.17132), section 3, takes the
logits of its sliding windows so, and sums the values by aggregation.
"""

from collections.abc import Iterator, Sequence
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


class Kernel(NamedTuple):
    """k x k taps, k odd, around every `stride`-th position of a map.

    The map's rows and columns fall into phases by their remainder, `stride` times `stride` maps of
    the output's size: tap a reads row ``s*i + a - k//2``, which is row ``i + (a - k//2) // s`` of
    phase ``(a - k//2) % s``.
    """

    k: int
    stride: int = 1

    @property
    def phases(self) -> int:
        return self.stride**2

    def pads(self, width: int) -> tuple[int, int]:
        """How far taps reach beyond both ends of a flattened phase of such a width."""
        before, after = self.k // 2 + self.stride - 1, self.k // 2
        return before // self.stride * (width + 1), after // self.stride * (width + 1)

    def distances(self) -> tuple[list[int], list[int]]:
        """Which phase the taps of one direction read, and how far from their own position there."""
        offsets = range(-(self.k // 2), self.k // 2 + 1)
        return [at % self.stride for at in offsets], [at // self.stride for at in offsets]

    def starts(self, width: int) -> Iterator[tuple[int, int]]:
        """The phase that each tap reads, and where in the flattened phase, with its pads."""
        phases, distances = self.distances()
        before, _ = self.pads(width)
        for row, down in zip(phases, distances):
            for col, right in zip(phases, distances):
                yield self.stride * row + col, before + down * width + right


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
        return strided_aggregation(x.to(dtype), weight.to(dtype), Kernel(k)).to(x.dtype)


def strided_aggregation(
    x: Tensor, weight: Tensor, kernel: Kernel, neighbors: bool = False
) -> Tensor:
    """:func:`small_kernel_aggregation` of the neighborhoods of every `stride`-th position.

    Args:
        x: (B, C, H, W), float32 or wider, where autocast is off.
        weight: (B, wc, k*k, H', W') or (B, k*k, H', W') of `x`'s type, with H' and W' the sizes of
            `x` divided by the stride and rounded up.
        kernel: k and the stride.
        neighbors: weights are shared by C/wc neighboring channels.
    """
    recorded = is_recorded() and not reference_active()
    if neighbors and not recorded:  # what shares a kernel becomes an image of its own
        groups = weight.shape[1]
        maps = x.unflatten(1, (groups, -1)).flatten(0, 1)  # B*wc C/wc H W
        out = strided_aggregation(maps, weight.flatten(0, 1), kernel)
        return out.unflatten(0, (-1, groups)).flatten(1, 2)  # B C H' W'
    if kernel.stride > 1:
        (height, width), side = weight.shape[-2:], kernel.stride
        x = F.pad(x, (0, side * width - x.shape[3], 0, side * height - x.shape[2]))
    if recorded:
        return _recorded(_split_map(x, kernel.stride), weight, kernel, neighbors)
    weight = weight.unsqueeze(1) if weight.ndim == 4 else weight
    if reference_active():
        return _reference(x, weight, kernel)
    if kernel.stride > 1:
        x = F.pixel_unshuffle(x, kernel.stride)  # B C*s*s H' W'
    if _is_differentiated(x, weight) or is_transformed(x, weight):
        out = _SmallKernel.apply(x, weight, kernel)
        return out
    # On small maps the autograd function itself would cost a third of the time.
    return _eager(x, weight, kernel)


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
    dtype, kernel = at_least_float32(query, key), Kernel(kernel_size)
    with without_autocast(query):
        q, k = query.to(dtype), key.to(dtype)
        if reference_active():
            out = _correlation_reference(q, k, kernel)
        elif is_recorded():
            out = _correlation_recorded(q, k, kernel)
        elif _is_differentiated(query, key) or is_transformed(query, key):
            out = _SmallKernelCorrelation.apply(q, k, kernel)
        else:
            out = _correlation_eager(q, k, kernel)
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


def _reference(x: Tensor, weight: Tensor, kernel: Kernel) -> Tensor:
    patches = _patches(x, kernel).unflatten(3, weight.shape[3:])
    patches = patches.unflatten(1, (-1, weight.shape[1]))  # B C/wc wc K H' W'
    return (patches * weight.unsqueeze(1)).sum(3).flatten(1, 2)


def _patches(x: Tensor, kernel: Kernel) -> Tensor:
    """What each position reads, (B, C, K, positions)."""
    patches = F.unfold(x, kernel.k, padding=kernel.k // 2, stride=kernel.stride)
    return patches.unflatten(1, (x.shape[1], -1))


def _split_map(x: Tensor, stride: int) -> list[Tensor]:
    """Return the phases of a map (B, C, s*H', s*W'), each (B, C, H', W')."""
    if stride == 1:
        return [x]
    rows = x.unflatten(2, (-1, stride))  # axis by axis, as Core ML has no tensors of six
    halves = [rows[:, :, :, row].unflatten(3, (-1, stride)) for row in range(stride)]
    return [half[..., col] for half in halves for col in range(stride)]


def _recorded(
    phases: Sequence[Tensor], weight: Tensor, kernel: Kernel, neighbors: bool = False
) -> Tensor:
    """The eager path in operations that graphs have; height and width may be symbolic."""
    x = phases[0]
    height, width = x.shape[2:]
    grouped = weight.ndim == 5  # else no more than four axes, as many as ncnn has
    taps = (weight * _inside_recorded(x, kernel)).flatten(weight.ndim - 2)
    if grouped and not neighbors:
        taps = taps.transpose(1, 2)
    groups = (weight.shape[1], -1) if neighbors else (-1, weight.shape[1])
    flat: dict[int, Tensor] = {}
    out = None
    # (B, wc, 1, H'*W'), (B, 1, wc, H'*W') or (B, 1, H'*W'): one operation splits all taps, where
    # `taps[:, tap]` is several of each.
    parts = taps.split(1, 2 if neighbors else 1)
    for (phase, start), part in zip(kernel.starts(width), parts, strict=True):
        if phase not in flat:
            padded = F.pad(phases[phase].flatten(2), kernel.pads(width))
            flat[phase] = padded.unflatten(1, groups) if grouped else padded
        term = flat[phase][..., start : start + height * width] * part
        out = term if out is None else out + term
    assert out is not None  # k >= 1
    return (out.flatten(1, 2) if grouped else out).view_as(x)


def _inside_recorded(x: Tensor, kernel: Kernel) -> Tensor:
    """:func:`_inside` for maps as large as `x` as operations, in its type."""
    (height, width), k = x.shape[2:], kernel.k
    if kernel.stride == 1:  # a range is computed, where a tensor would be a constant of the graph
        distances = torch.arange(-(k // 2), k // 2 + 1, device=x.device)
    else:
        distances = torch.tensor(kernel.distances()[1], device=x.device)
    columns = torch.arange(width, device=x.device) + distances[:, None]
    # (column of the kernel, column of the map); Core ML's converter knows no `&`
    inside = torch.logical_and(columns >= 0, columns < width)
    return inside.to(x.dtype)[None, :, None].expand(k, k, height, width).flatten(0, 1)


def _eager(x: Tensor, weight: Tensor, kernel: Kernel) -> Tensor:
    """One multiply-add per tap on flattened maps.

    There a tap is an offset, and its products run over whole maps instead of rows. An offset wraps
    around at the left and right border; at these positions the weight is set to zero.
    """
    flat, taps = _flatten(x, weight, kernel)
    views = _shifted(flat, x, kernel)
    out = torch.mul(next(views), taps[0])
    for shifted, tap in zip(views, taps[1:], strict=True):
        out.addcmul_(shifted, tap)
    out = out.view(x.shape[0], -1, *x.shape[2:])
    return in_layout_of(x, out)


class _SmallKernel(Bilinear):
    """The eager path, forward and backward, of the phases of a map: (B, C*s*s, H', W')."""

    @staticmethod
    def recorded(x: Tensor, weight: Tensor, kernel: Kernel) -> Tensor:
        return _recorded(x.unflatten(1, (-1, kernel.phases)).unbind(2), weight, kernel)

    @staticmethod
    def forward(x: Tensor, weight: Tensor, kernel: Kernel) -> Tensor:
        return _eager(x, weight, kernel)

    @staticmethod
    def gradients(
        x: Tensor, weight: Tensor, kernel: Kernel, grad: Tensor, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        shape, groups = x.shape, weight.shape[1]
        flat, taps = _flatten(x, weight, kernel)
        grad_out = grad.contiguous().view(shape[0], -1, groups, shape[2] * shape[3])
        grad_x = grad_weight = None
        if needed[0]:
            grad_flat = torch.zeros_like(flat)
            for shifted, tap in zip(_shifted(grad_flat, x, kernel), taps, strict=True):
                shifted.addcmul_(grad_out, tap)
            before, _ = kernel.pads(shape[3])
            inner = grad_flat[..., before : before + shape[2] * shape[3]]
            grad_x = in_layout_of(x, inner.reshape(shape))
        if needed[1]:
            by_tap = [(shifted * grad_out).sum(1) for shifted in _shifted(flat, x, kernel)]
            grad_weight = torch.stack(by_tap, 2).view(weight.shape)
            _zero_wrapped(grad_weight, kernel)
        return grad_x, grad_weight


def _correlation_reference(query: Tensor, key: Tensor, kernel: Kernel) -> Tensor:
    patches = _patches(key, kernel).unflatten(3, key.shape[2:])  # B C K H W
    return (patches * query.unsqueeze(2)).sum(1)


def _correlation_recorded(query: Tensor, key: Tensor, kernel: Kernel) -> Tensor:
    """The eager path in operations that graphs have; height and width may be symbolic."""
    height, width = key.shape[2:]
    maps, flat = query.flatten(2), F.pad(key.flatten(2), kernel.pads(width))
    starts = [start for _, start in kernel.starts(width)]
    by_tap = [(maps * flat[..., start : start + height * width]).sum(1) for start in starts]
    out = torch.stack(by_tap, 1).unflatten(2, (height, width))
    return out * _inside_recorded(query, kernel)


def _correlation_eager(query: Tensor, key: Tensor, kernel: Kernel) -> Tensor:
    """One multiply-add per channel, of all taps at once, on the flattened map.

    As in :func:`_eager`, what wraps around is set to zero.
    """
    batch, channels, height, width = query.shape
    k, size = kernel.k, height * width
    maps = query.contiguous().view(batch, channels, 1, 1, size)
    flat = F.pad(key.contiguous().view(batch, channels, size), kernel.pads(width))
    shape, stride = (batch, channels, k, k, size), flat.stride()
    windows = flat.as_strided(shape, (*stride[:2], width, 1, 1))  # (B, C, row, column, H*W)
    out = query.new_zeros(batch, k, k, size)
    for channel in range(channels):
        out.addcmul_(windows[:, channel], maps[:, channel])
    out = out.view(batch, k * k, height, width)
    _zero_wrapped(out.unsqueeze(1), kernel)
    return out


class _SmallKernelCorrelation(Bilinear):
    """The eager path, forward and backward; the gradients are those of aggregation."""

    recorded = staticmethod(_correlation_recorded)

    @staticmethod
    def forward(query: Tensor, key: Tensor, kernel: Kernel) -> Tensor:
        return _correlation_eager(query, key, kernel)

    @staticmethod
    def gradients(
        query: Tensor, key: Tensor, kernel: Kernel, grad: Tensor, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        weight = grad.unsqueeze(1)
        of_query = _eager(key, weight, kernel) if needed[0] else None
        of_key, _ = _SmallKernel.gradients(key, weight, kernel, query, (needed[1], False))
        return of_query, of_key


def _flatten(x: Tensor, weight: Tensor, kernel: Kernel) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The phases as (B, C/wc, wc, s*s, H'*W' and pads); per tap (B, 1, wc, H'*W') weights."""
    batch, channels, height, width = x.shape
    groups, size = weight.shape[1], height * width
    if weight.device.type == "cpu":
        inside = torch.from_numpy(_inside(kernel, height, width, weight.dtype == torch.float32))
        masked = weight.contiguous() * inside
    else:  # a table would have to be sent there
        masked = weight.clone(memory_format=torch.contiguous_format)
        _zero_wrapped(masked, kernel)
    # Of four axes, padding would keep the layout that a map of one position seems to have.
    flat = F.pad(x.contiguous().view(batch, channels, size), kernel.pads(width))
    taps = masked.view(batch, 1, groups, -1, size).unbind(3)
    return flat.view(batch, -1, groups, kernel.phases, flat.shape[2]), taps


def _shifted(flat: Tensor, x: Tensor, kernel: Kernel) -> Iterator[Tensor]:
    """Views (B, C/wc, wc, H'*W') of the flattened phases, which are as large as `x`, one a tap."""
    height, width = x.shape[2:]
    shape, stride = (*flat.shape[:3], height * width), flat.stride()
    for phase, start in kernel.starts(width):
        yield flat.as_strided(shape, (*stride[:3], 1), phase * stride[3] + start)


@lru_cache(maxsize=64)
def _inside(kernel: Kernel, height: int, width: int, single: bool) -> npt.NDArray[np.floating]:
    """1 where a tap's column lies inside its phase, else 0, (K, H', W'); float32 if `single`."""
    column = np.arange(width) + np.array(kernel.distances()[1])[:, None]
    inside = ((column >= 0) & (column < width)).astype(np.float32 if single else np.float64)
    return np.tile(inside[:, None], (kernel.k, height, 1)).reshape(-1, height, width)


def _zero_wrapped(weight: Tensor, kernel: Kernel) -> None:
    """Zero, in place, the weights whose column lies outside of its phase, left and right."""
    by_col = weight.unflatten(2, (-1, kernel.k))
    for col, distance in enumerate(kernel.distances()[1]):
        if distance:
            first = max(weight.shape[4] - distance, 0)
            out = slice(None, -distance) if distance < 0 else slice(first, None)
            by_col[:, :, :, col, :, out].zero_()
