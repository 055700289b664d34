"""Dilated convolution with learnable spacings: a large kernel made of a few movable points.

Source: "Dilated convolution with learnable spacings" (arXiv 2112.03740), section 2.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import merge
from backbones.layers import CachedTensor, fx_leaf
from backbones.ops import at_least_float32, without_autocast

__all__ = ["SpacedConv", "kernel_from_points"]


@fx_leaf
def kernel_from_points(weight: Tensor, positions: Tensor, size: int) -> Tensor:
    """Return the dense kernel of points at fractional positions (section 2.2, two dimensions).

    Each point is spread over the four cells around it with the weights of bilinear interpolation;
    what falls outside of the kernel is dropped. Differentiable in both arguments; at a whole
    position the derivative is that to larger positions. Half types are computed in float32.

    Args:
        weight: (C, n), the points' weights.
        positions: (2, C, n), rows and columns, in cells from the kernel's center.
        size: side k of the kernel, odd.

    Returns:
        (C, 1, k, k), of `weight`'s type.
    """
    dtype = at_least_float32(weight, positions)
    with without_autocast(weight):
        places = (positions.to(dtype) + size // 2).unsqueeze(-2)  # 2 C 1 n
        low = places.floor().detach()
        share = places - low
        cells = torch.arange(size, dtype=dtype, device=weight.device).unsqueeze(-1)
        nothing = torch.zeros_like(share)
        rows, columns = torch.where(
            cells == low, 1 - share, torch.where(cells == low + 1, share, nothing)
        )  # each C k n
        kernel = (rows * weight.to(dtype).unsqueeze(-2)) @ columns.transpose(-1, -2)  # C k k
        return kernel.unsqueeze(1).to(weight.dtype)


class SpacedConv(nn.Module):
    """A depthwise convolution whose kernel is made of points; the caller holds their positions.

    Without gradients the dense kernel is built once and cached until weights or positions change.
    The convolution keeps the feature map's size. On CPUs a 17x17 depthwise convolution runs far
    faster in the channels_last memory format.

    Args:
        dim: number of channels.
        kernel_size: side of the dense kernel, odd.
        points: number of points in each channel's kernel.
        dilation: distance of the dense kernel's cells.
    """

    def __init__(self, dim: int, kernel_size: int, points: int, dilation: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.weight = nn.Parameter(torch.empty(dim, points))
        self.bias = nn.Parameter(torch.empty(dim))
        self.cached = CachedTensor()

    def kernel(self, positions: Tensor) -> Tensor:
        """Return the dense kernel (C, 1, k, k) for points at `positions` (2, C, n)."""
        build = partial(kernel_from_points, size=self.kernel_size)
        return self.cached.get(build, self.weight, positions)

    @torch.no_grad()
    def merged(self, positions: Tensor) -> nn.Conv2d:
        """Return the plain convolution with the dense kernel of points at `positions`."""
        plain = nn.Conv2d(
            self.dim,
            self.dim,
            self.kernel_size,
            padding=self.kernel_size // 2 * self.dilation,
            dilation=self.dilation,
            groups=self.dim,
            device="meta",
        )
        kernel = kernel_from_points(self.weight.double(), positions.double(), self.kernel_size)
        plain.weight = nn.Parameter(kernel.to(self.weight.dtype), self.weight.requires_grad)
        plain.bias = self.bias
        merge.record("points into a dense kernel")
        return plain.train(self.training)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return F.conv2d(
            x,
            self.kernel(positions),
            self.bias,
            padding=self.kernel_size // 2 * self.dilation,
            dilation=self.dilation,
            groups=self.dim,
        )
