"""Depthwise convolutions with large kernels as sums of those with small ones.

XNNPACK, which LiteRT and ExecuTorch run on, has depthwise kernels of up to 25 taps; what is larger
takes about six times as long for each tap.
"""

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from backbones.engines.rewrites.convolutions import depthwise

__all__ = ["TAPS", "TiledConv2d", "is_large_depthwise", "split_large_kernels"]

TAPS = 25


class TiledConv2d(nn.Module):
    """A depthwise convolution as the sum of those by the tiles of its kernel.

    The map is padded once, and each tile sees the part of it that lies under it. `conv` pads with
    zeros, by numbers.
    """

    def __init__(self, conv: nn.Conv2d, taps: int = TAPS) -> None:
        super().__init__()
        height, width = conv.kernel_size
        rows, columns = _tile(height, width, taps)
        down, across = conv.dilation
        above, beside = (int(pad) for pad in conv.padding)
        self.padding = (beside, beside, above, above)
        self.reach = (down * (height - 1), across * (width - 1))
        self.spans: list[tuple[int, int, int, int]] = []  # of a tile: first and last rows, columns
        parts: list[nn.Module] = []
        for row in range(0, height, rows):
            for column in range(0, width, columns):
                weight = conv.weight[..., row : row + rows, column : column + columns]
                part = depthwise(conv, weight, None if parts else conv.bias)
                part.kernel_size, part.padding = tuple(weight.shape[2:]), (0, 0)
                parts.append(part)
                last_row, last_column = row + weight.shape[2] - 1, column + weight.shape[3] - 1
                self.spans.append(
                    (down * row, down * last_row, across * column, across * last_column)
                )
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, self.padding)
        # How far a kernel of one tap would go.
        height, width = (size - reach for size, reach in zip(x.shape[2:], self.reach))
        total: Tensor | None = None
        for (top, bottom, left, right), part in zip(self.spans, self.parts):
            y = part(x[..., top : bottom + height, left : right + width])
            total = y if total is None else total + y
        assert total is not None  # a kernel has a tile
        return total


def split_large_kernels(model: nn.Module, taps: int = TAPS) -> nn.Module:
    """Return a copy of a model in which depthwise convolutions have at most so many taps."""
    model = copy.deepcopy(model)
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if type(child) is nn.Conv2d and is_large_depthwise(child, taps):
                module._modules[name] = TiledConv2d(child, taps)
    return model


def is_large_depthwise(conv: nn.Conv2d, taps: int = TAPS) -> bool:
    """Tell whether a convolution is depthwise, has more taps, and pads with zeros, by numbers."""
    height, width = conv.kernel_size
    single = conv.groups == conv.in_channels == conv.out_channels > 1
    plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return single and plain and height * width > taps


def _tile(height: int, width: int, taps: int) -> tuple[int, int]:
    """Return the tile, of at most so many taps, that covers a kernel by the fewest; wide ones."""

    def fitting(rows: int) -> tuple[int, int]:
        return rows, min(width, taps // rows)

    def count(tile: tuple[int, int]) -> int:
        return -(-height // tile[0]) * -(-width // tile[1])

    return min(map(fitting, range(1, min(height, taps) + 1)), key=count)
