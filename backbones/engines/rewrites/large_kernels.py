"""Depthwise convolutions with large kernels as sums of those with small ones.

XNNPACK, which LiteRT and ExecuTorch run on, has depthwise kernels of up to 25 taps; what is larger
takes about six times as long for each tap.
"""

import copy
from collections.abc import Iterator

from torch import Tensor, nn

from backbones.engines.rewrites.convolutions import depthwise

__all__ = ["TAPS", "DepthwiseSum", "progressions", "split_large_kernel", "split_large_kernels"]

TAPS = 25


class DepthwiseSum(nn.Module):
    """A depthwise convolution as a sum of depthwise ones with at most `TAPS` taps each.

    Rows and columns of the kernel are parted in progressions around its middle, which are kernels
    with a dilation and the same middle: no map is cut or padded, and every size keeps its result.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_parts(conv))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.parts
        y: Tensor = first(x)
        for part in others:
            y = y + part(x)
        return y


def split_large_kernel(conv: nn.Conv2d) -> nn.Module:
    """Return a convolution, a large depthwise one as a sum of small ones where that is possible.

    It must pad with zeros, by numbers and by half the kernel or more: with less, parts of the
    kernel would begin beyond the border of the map.
    """
    single = conv.groups == conv.in_channels == conv.out_channels > 1
    if not single or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return conv
    height, width = conv.kernel_size
    padded = all(
        2 * pad >= step * (size - 1)
        for pad, step, size in zip(conv.padding, conv.dilation, conv.kernel_size)
    )
    return DepthwiseSum(conv) if padded and height * width > TAPS else conv


def split_large_kernels(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which :func:`split_large_kernel` took every convolution."""
    model = copy.deepcopy(model)
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if type(child) is nn.Conv2d:
                module._modules[name] = split_large_kernel(child)
    return model


def _parts(conv: nn.Conv2d) -> Iterator[nn.Conv2d]:
    """Yield the summands; the first has the bias."""
    bias = conv.bias
    above, beside = (int(pad) for pad in conv.padding)
    down, across = conv.dilation
    for rows, columns in _fewest(*conv.kernel_size):
        kernel = conv.weight[:, :, list(rows)][..., list(columns)]
        part = depthwise(conv, kernel, bias)
        part.kernel_size = len(rows), len(columns)
        part.padding = above - down * rows[0], beside - across * columns[0]
        part.dilation = down * rows.step, across * columns.step
        bias = None
        yield part


def _fewest(height: int, width: int) -> list[tuple[range, range]]:
    """Part the taps of a kernel in as few rectangles, rows and columns, as `progressions` gives."""
    most_columns = TAPS // min(height, 2)  # of more than one row pairs are the least
    ways = [
        [
            (rows, columns)
            for columns in progressions(width, most)
            for rows in progressions(height, TAPS // len(columns))
        ]
        for most in range(2, most_columns + 1)
    ]
    return min(ways, key=len)


def progressions(count: int, most: int) -> list[range]:
    """Part ``range(count)`` in progressions of at most `most` that are symmetric around its middle.

    `most` is 2 or more. The longest comes first, of those as long the one with the smallest step.
    """
    left, found = set(range(count)), []
    while left:
        candidates = [
            places
            for first in range((count + 1) // 2)
            for step in range(1, max(count, 2))
            if (count - 1 - 2 * first) % step == 0
            and len(places := range(first, count - first, step)) <= most
            and left.issuperset(places)
        ]
        best = max(candidates, key=lambda places: (len(places), -places.step))
        found.append(best)
        left -= {*best}
    return found
