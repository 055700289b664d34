"""Convolution whose kernels are made from the context at every position (OverLoCK's ContMix)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import merge
from backbones.layers import conv_norm, fx_leaf, statistics_dtype
from backbones.ops import adaptive_mean, neighborhood_aggregation, neighborhood_bias

__all__ = ["DynamicConv"]

REGIONS = 7
SMALL_KERNEL = 5


@fx_leaf
def _enlarge(x: Tensor, kernel_size: int) -> Tensor:
    """Resize a feature map whose shorter side is below the kernel until that side equals it."""
    height, width = x.shape[-2:]
    if min(height, width) >= kernel_size:
        return x
    # The authors' order of floating-point operations: its rounding decides the longer side.
    if height < width:
        size = (kernel_size, max(kernel_size, int(kernel_size / height * width)))
    else:
        size = (max(kernel_size, int(kernel_size / width * height)), kernel_size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


@fx_leaf
def _shrink(x: Tensor, like: Tensor) -> Tensor:
    """Pool an enlarged feature map back to the size of `like`."""
    height, width = like.shape[-2:]
    same = x.shape[-2:] == like.shape[-2:]
    return x if same else adaptive_mean(x, (height, width))


@fx_leaf
def _mix(
    values: Tensor,
    query: Tensor,
    key: Tensor,
    kernel: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
) -> Tensor:
    """Aggregate `values` with the kernels that affinities to regions give at each position.

    Args:
        values: (B, C, H, W), channels ordered (kernel, group, channel).
        query: (B, G * c, H, W).
        key: (B, G * c, R), the keys of R regions.
        kernel: (T, R) and (T,), the linear layer that gives the logits of both kernels' T taps.
        tables: (G, 2k - 1, 2k - 1) for each of the two kernel sizes k.
    """
    groups, size = tables[0].shape[0], values.shape[-2:]
    dtype = statistics_dtype(query)
    query = query.flatten(2).unflatten(1, (groups, -1)).transpose(2, 3).to(dtype)  # B G N c
    kernels = [(table.shape[-1] + 1) // 2 for table in tables]
    taps = [k * k for k in kernels]
    mixed = []
    weight, biases = kernel
    # Being linear, the layer acts on the keys of the regions, once for all queries. Its weight is
    # taken whole, as quantized ones cannot be split.
    keys = F.linear(key, weight).unflatten(1, (groups, -1))  # B G c T
    for value, own_keys, bias, table, k in zip(
        # In two steps, as one would take six axes, which Core ML has not.
        [half.unflatten(1, (groups, -1)) for half in values.chunk(2, 1)],
        keys.split(taps, dim=-1),
        biases.split(taps),
        tables,
        kernels,
    ):
        logits = (query @ own_keys.to(dtype)).unflatten(2, size)  # B G H W K
        weights = (logits + (neighborhood_bias(table, (size[0], size[1])) + bias)).softmax(-1)
        mixed.append(neighborhood_aggregation(value, weights.to(value.dtype), k))
    return torch.cat(mixed, dim=1).flatten(1, 2)  # B C H W


class DynamicConv(nn.Module):
    """Depthwise convolution with a small and a large kernel made from the context.

    In each of G groups of channels a position's query is compared with keys of 7 x 7 regions of
    the context; a linear layer turns these 49 affinities into the logits of both kernels, a
    relative position bias is added, and their softmax weighs the neighborhood. Half of the channels
    see the small kernel, half the large one. A feature map smaller than the large kernel is
    enlarged for it and pooled back. Source: OverLoCK (arXiv 2502.20087), section 3.3.

    Args:
        dim: channels of the values.
        context_dim: channels of the context.
        kernel_size: the large kernel.
        groups: G; divides ``dim // 2``.
    """

    def __init__(self, dim: int, context_dim: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.split = (dim, context_dim)
        self.kernel_size = kernel_size
        self.scale = (dim // groups) ** -0.5
        self.query = conv_norm(dim, dim // 2, 1)
        self.key = conv_norm(context_dim, dim // 2, 1)
        self.kernel = nn.Linear(REGIONS**2, SMALL_KERNEL**2 + kernel_size**2)
        side = 2 * SMALL_KERNEL - 1
        self.bias_small = nn.Parameter(torch.zeros(groups, side, side))
        side = 2 * kernel_size - 1
        self.bias_large = nn.Parameter(torch.zeros(groups, side, side))
        self.proj = conv_norm(dim, dim, 1)

    def forward(self, values: Tensor, guide: Tensor) -> Tensor:
        """Mix `values` (B, dim, H, W) as `guide` says, (B, dim + context_dim, H, W)."""
        wide = _enlarge(values, self.kernel_size)
        x, context = _enlarge(guide, self.kernel_size).split(self.split, dim=1)
        query = self.query(x)
        if self.scale != 1:
            query = query * self.scale
        key = self.key(adaptive_mean(context, (REGIONS, REGIONS))).flatten(2)  # B C/2 R
        kernel = self.kernel.weight, self.kernel.bias
        mixed = _mix(wide, query, key, kernel, (self.bias_small, self.bias_large))
        return self.proj(_shrink(mixed, values))

    def reparameterize(self) -> None:
        """Fold the norms, and the scale of the queries into their convolution."""
        for chain in (self.query, self.key, self.proj):
            merge.fold_chain(chain)
        query: nn.Conv2d = self.query.get_submodule("conv")  # type: ignore[assignment]
        self.scale = merge.factor_into_outputs(query, self.scale)
