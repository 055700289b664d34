"""CPUBone's attention without a split."""

import torch
from torch import Tensor, nn

from backbones.engines.rewrites.convolutions import select_outputs
from backbones.families.cpubone import ConvAttention, padded

__all__ = ["SeparateHeads"]


class SeparateHeads(nn.Module):
    """Re-parameterized attention with a projection each for queries, keys and values.

    It takes over the other parts of `attention`.
    """

    def __init__(self, attention: ConvAttention) -> None:
        super().__init__()
        self.stride, self.num_heads = attention.stride, attention.num_heads
        self.scale = attention.scale
        self.conv_proj, self.upsampling = attention.conv_proj, attention.upsampling
        # The channels of one head are its queries, keys and values, in this order.
        part = torch.arange(attention.pwise.out_channels) // attention.head_dim % 3
        self.q, self.k, self.v = (
            select_outputs(attention.pwise, (part == which).nonzero().flatten())
            for which in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2], x.shape[-1]
        x = self.conv_proj(padded(x, self.stride))
        maps = [project(x) for project in (self.q, self.k, self.v)]
        q, k, v = (y.flatten(2).unflatten(1, (self.num_heads, -1)) for y in maps)
        q = q if self.scale == 1 else q * self.scale
        attention = (q.transpose(-2, -1) @ k).softmax(-1)
        mixed = (v @ attention.transpose(-2, -1)).flatten(1, 2).view_as(maps[2])
        x = self.upsampling(mixed)
        return x[..., :height, :width] if self.stride > 1 else x
