"""Attention without a split."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backbones.families.cpubone.attention import ConvAttention, padded
from backbones.families.lsnet.attention import DistanceAttention, attend
from backbones.lowering.parts import outputs_of

__all__ = ["SeparateHeads", "SeparateProjections"]


class SeparateProjections(nn.Module):
    """LSNet's merged attention with a projection each for queries, keys and values.

    It takes over the other parts of `attention`.
    """

    def __init__(self, attention: DistanceAttention) -> None:
        super().__init__()
        conv = attention.qkv.conv
        queries, keys, _ = attention.split
        self.q = nn.Sequential(outputs_of(conv, slice(0, queries)), attention.q_dw)
        self.k = outputs_of(conv, slice(queries, queries + keys))
        self.v = outputs_of(conv, slice(queries + keys, None))
        self.scale, self.attention_biases = attention.scale, attention.attention_biases
        self.act, self.proj = attention.act, attention.proj

    def forward(self, x: Tensor) -> Tensor:
        mixed = attend(self.q(x), self.k(x), self.v(x), self.attention_biases, self.scale)
        return x + self.proj(self.act(mixed))


class SeparateHeads(nn.Module):
    """CPUBone's merged attention with a projection each for queries, keys and values.

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
            outputs_of(attention.pwise, (part == which).nonzero().flatten()) for which in range(3)
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
