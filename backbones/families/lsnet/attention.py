"""Attention over a feature map, with biases that depend on how far apart two positions are.

Source: LSNet (arXiv 2503.23135), whose last stage uses it, after LeViT (arXiv 2104.01136).
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from backbones import merge
from backbones.layers import conv_norm, fx_leaf, statistics_dtype

__all__ = ["DistanceAttention", "attend", "distance_bias", "resize_tables"]

HEADS, KEY_DIM = 4, 16
DENSE_SIZE = 14  # side of the feature maps that LSNet's dense models hold biases for


def resize_tables(tables: Tensor, size: int) -> Tensor:
    """Resize bias tables (heads, S*S) to (heads, size*size), in at least float32."""
    side = math.isqrt(tables.shape[1])
    if side == size:
        return tables
    square = tables.to(statistics_dtype(tables)).view(1, -1, side, side)  # 1 G S S
    square = F.interpolate(square, size=(size, size), mode="bicubic", align_corners=False)
    return square.flatten(2)[0]


@fx_leaf
def distance_bias(x: Tensor, tables: Tensor) -> Tensor:
    """Return what is added to the attention logits of a feature map `x`: (heads, H*W, H*W).

    Entry ``|dy| * S + |dx|`` of a table (heads, S*S) is the bias of two positions that far apart.
    A feature map of S x S takes the tables as they are. Any other goes the way of the authors'
    dense models: tables for 14x14, whose bias matrix is resized like an image.
    """
    height, width = x.shape[-2:]
    size = math.isqrt(tables.shape[1])
    if (height, width) != (size, size):
        size = DENSE_SIZE
        tables = resize_tables(tables, size)
    steps = torch.arange(size, device=tables.device)
    apart = (steps[:, None] - steps).abs()
    pairs = tables.unflatten(1, (size, size))[:, apart][..., apart]  # G H H W W
    matrix = pairs.transpose(2, 3).flatten(3).flatten(1, 2)  # G N N
    if height * width != size * size:
        matrix = matrix.to(statistics_dtype(matrix)).unsqueeze(0)
        area = (height * width, height * width)
        matrix = F.interpolate(matrix, size=area, mode="bicubic", align_corners=False)[0]
    return matrix


def attend(q: Tensor, k: Tensor, v: Tensor, tables: Tensor, scale: float) -> Tensor:
    """Return the values `v` (B, C, H, W) that queries and keys choose at each position."""
    bias = distance_bias(v, tables)
    shape = v.shape
    q, k, v = (part.flatten(2).unflatten(1, (HEADS, -1)) for part in (q, k, v))  # B G c N
    q = q if scale == 1 else q * scale
    logits = q.transpose(-2, -1) @ k  # B G N N
    attention = (logits + bias.to(logits.dtype)).softmax(-1)
    return (v @ attention.transpose(-2, -1)).flatten(1, 2).view(shape)  # B C H W


class DistanceAttention(nn.Module):
    """``x + proj(relu(attention(x)))`` with a bias for every distance and convolved queries.

    Args:
        dim: channels of the feature map.
        table_size: side of the feature map for which biases are held.
        drop_path: rate of stochastic depth.
    """

    def __init__(self, dim: int, table_size: int, drop_path: float) -> None:
        super().__init__()
        keys = HEADS * KEY_DIM
        self.split = (keys, keys, dim)
        self.scale = KEY_DIM**-0.5
        self.qkv = conv_norm(dim, 2 * keys + dim, 1)
        self.q_dw = conv_norm(keys, keys, 3, groups=keys)
        self.attention_biases = nn.Parameter(torch.zeros(HEADS, table_size**2))
        self.act = nn.ReLU()
        self.proj = conv_norm(dim, dim, 1)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(self.split, dim=1)
        mixed = attend(self.q_dw(q), k, v, self.attention_biases, self.scale)
        return x + self.drop_path(self.proj(self.act(mixed)))

    def reparameterize(self) -> None:
        """Fold the norms and the scale, and drop the bias of the keys."""
        for chain in (self.qkv, self.q_dw, self.proj):
            merge.fold_chain(chain)
        self.scale = merge.factor_into_outputs(self.q_dw.conv, self.scale)
        queries, keys, _ = self.split
        merge.drop_softmax_bias(self.qkv.conv, slice(queries, queries + keys))
