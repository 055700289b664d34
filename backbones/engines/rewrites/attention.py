"""Attention of CPUBone and LSNet with a projection each for queries, keys and values: no split.

The forms take over the other parts of the re-parameterized attention.
"""

import torch
from torch import Tensor, nn

from backbones.engines.rewrites.convolutions import select_outputs
from backbones.families.cpubone import ConvAttention, padded
from backbones.families.lsnet import DistanceAttention, attend

__all__ = ["SeparateHeads", "SeparateProjections"]


class SeparateHeads(nn.Module):
    """CPUBone's attention, whose projection has the three parts of one head side by side."""

    def __init__(self, attention: ConvAttention) -> None:
        super().__init__()
        self.stride, self.num_heads = attention.stride, attention.num_heads
        self.scale = attention.scale
        self.conv_proj, self.upsampling = attention.conv_proj, attention.upsampling
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


class SeparateProjections(nn.Module):
    """LSNet's attention, whose projection has queries, keys and values one after the other."""

    def __init__(self, attention: DistanceAttention) -> None:
        super().__init__()
        conv = attention.qkv.conv
        queries, keys, _ = attention.split
        self.q = nn.Sequential(select_outputs(conv, slice(0, queries)), attention.q_dw)
        self.k = select_outputs(conv, slice(queries, queries + keys))
        self.v = select_outputs(conv, slice(queries + keys, None))
        self.scale, self.attention_biases = attention.scale, attention.attention_biases
        self.act, self.proj = attention.act, attention.proj

    def forward(self, x: Tensor) -> Tensor:
        mixed = attend(self.q(x), self.k(x), self.v(x), self.attention_biases, self.scale)
        return x + self.proj(self.act(mixed))
