"""TransNeXt's attention: by the cosine of queries and keys, over windows and pooled maps at once.

Source: TransNeXt (arXiv 2311.17132), section 3. Keys and queries have length one; the logits grow
with the logarithm of the number of keys, so that the same weights serve any size.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, trunc_normal_
from torch import Tensor, nn

from backbones import merge, ops
from backbones.families.transnext.positions import PositionBias, Tables, tables_of
from backbones.layers import fx_leaf

__all__ = ["HEAD_DIM", "AggregatedAttention", "CosineAttention"]

HEAD_DIM = 24  # channels of a head, in every variant and stage
WINDOW = 3


class CosineAttention(nn.Module):
    """Attention of every position of a map (B, H, W, C) to every other, by cosines (section 3).

    ``softmax(softplus(temperature) * ln(N) * (q + query_embedding) k + bias) v``, with `q` and `k`
    of length one.

    Args:
        dim: channels, a multiple of 24.
        pretrain: side of the map in training; see :func:`tables_of`.
    """

    qkv: Any  # projections, by a layer or, until they are merged, None

    def __init__(self, dim: int, pretrain: int) -> None:
        super().__init__()
        self.num_heads = dim // HEAD_DIM
        self.pretrain = pretrain
        self.temperature: nn.Parameter | None = nn.Parameter(torch.empty(self.num_heads, 1, 1))
        self.scale: nn.Parameter | None = None  # softplus of the temperature, once merged
        self.query_embedding = nn.Parameter(torch.empty(self.num_heads, 1, HEAD_DIM))
        self.cpb = PositionBias(self.num_heads)
        self.build_projections(dim)
        self.proj = nn.Linear(dim, dim)

    def build_projections(self, dim: int) -> None:
        """Make the layers that read the map."""
        self.qkv = nn.Linear(dim, 3 * dim)

    def init_parameters(self) -> None:
        """Initialize what belongs to no layer; cosines are multiplied by 1 / 0.24 at first."""
        if self.temperature is not None:
            nn.init.constant_(self.temperature, math.log(math.expm1(1 / 0.24)))
        trunc_normal_(self.query_embedding, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        tables = tables_of(x, 1, self.pretrain)
        mixed = _attend(self.qkv(x), self.cpb(tables), self)  # B N C
        return self.proj(mixed).view(x.shape)

    def queries(self, q: Tensor) -> Tensor:
        """Add the embedding to queries (B, G, c, N) of length one, and multiply by the scale."""
        embedding = self.query_embedding.mT.to(q.dtype)
        if self.temperature is not None:
            return (q + embedding) * F.softplus(self.temperature.to(q.dtype))
        assert self.scale is not None  # one of both is there
        return q * self.scale.to(q.dtype) + embedding

    def reparameterize(self) -> None:
        """Compute the scale, and drop or move the offsets that the softmax lets through."""
        self.fix_scale()
        merge.drop_softmax_bias(self.cpb.fc2, slice(None))
        merge.uniform_bias_into_next(self.qkv, slice(2 * self.proj.in_features, None), self.proj)

    def stack_readers(self) -> None:
        """Make one layer, `qkv`, of those that read the map; here it is one."""

    def fix_scale(self) -> None:
        """Let the scale and what it multiplies take the place of the temperature."""
        if self.temperature is not None:
            self.scale = merge.function_into_parameter(self.temperature, F.softplus)
            merge.scale_parameter(self.query_embedding, self.scale)
            self.temperature = None


class AggregatedAttention(CosineAttention):
    """Attention of every position to its 3x3 window and to the pooled map, in one softmax.

    ``sum_t (P_t + q learnable_tokens_t + learnable_bias_t) v_t + sum_m P_m v_m`` over the taps t of
    the window and the pooled positions m, with P the softmax over all that are inside the map.
    Source: section 3, aggregated attention with query embedding and positional attention.

    Parts: `q`, `kv` (which also reads the pooled map), `sr` and `norm` before and after pooling.
    Once merged, `qkv` has queries, keys, values and `sr` of the map and `kv_pool` those of the
    pooled one.

    Args:
        dim: channels, a multiple of 24.
        ratio: positions of a pooled one on each axis.
        pretrain: side of the map in training; see :func:`tables_of`.
    """

    def __init__(self, dim: int, ratio: int, pretrain: int) -> None:
        super().__init__(dim, pretrain)
        self.ratio = ratio
        taps = WINDOW**2
        self.relative_pos_bias_local = nn.Parameter(torch.empty(self.num_heads, taps))
        self.learnable_tokens = nn.Parameter(torch.empty(self.num_heads, HEAD_DIM, taps))
        self.learnable_bias = nn.Parameter(torch.empty(self.num_heads, 1, taps))

    def build_projections(self, dim: int) -> None:
        self.qkv: nn.Module | None = None
        self.q: Any = nn.Linear(dim, dim)
        self.kv: Any = nn.Linear(dim, 2 * dim)
        self.sr: Any = nn.Linear(dim, dim)
        self.act = nn.GELU()
        self.norm: nn.Module = LayerNorm(dim, eps=1e-5)
        self.kv_pool: Any = None

    def init_parameters(self) -> None:
        super().init_parameters()
        trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        trunc_normal_(self.learnable_tokens, std=0.02)
        nn.init.zeros_(self.learnable_bias)

    def forward(self, x: Tensor) -> Tensor:
        tables = tables_of(x, self.ratio, self.pretrain)
        if self.qkv is None:
            q, kv, pooled = self.q(x), self.kv(x), self.sr(x)
            kv_pool = self.kv
        else:
            dim = self.proj.in_features
            q, kv, pooled = self.qkv(x).split((dim, 2 * dim, dim), -1)
            kv_pool = self.kv_pool
        pooled = kv_pool(self.norm(_pool(self.act(pooled), tables)))  # B P 2C
        mixed = _aggregate(q, kv, pooled, self.cpb(tables), tables, self)  # B N C
        return self.proj(mixed).view(x.shape)

    def reparameterize(self) -> None:
        self.fix_scale()
        self.stack_readers()

    def stack_readers(self) -> None:
        """Make one layer of those that read the map, and another of those that read it pooled."""
        if self.qkv is None:
            self.kv_pool = copy.deepcopy(self.kv)
            self.norm = merge.norm_into_next(self.norm, self.kv_pool)
            self.qkv = merge.stack_linear_layers(self.q, self.kv)
            self.qkv = merge.stack_linear_layers(self.qkv, self.sr)
            self.q = self.kv = self.sr = None


@fx_leaf
def _pool(x: Tensor, tables: Tables) -> Tensor:
    """Pool a map (B, H, W, C) to (B, P, C)."""
    rows, columns = tables.pool_rows.to(x.dtype), tables.pool_columns.to(x.dtype)
    x = (rows @ x.flatten(2)).unflatten(2, x.shape[2:])  # B pH W C
    return (columns @ x).flatten(1, 2)


def _split_heads(x: Tensor, parts: int) -> Sequence[Tensor]:
    """Split (B, N, parts * C) into parts (B, G, c, N) in memory of their own, at least float32."""
    x = x.mT.to(ops.at_least_float32(x)).contiguous()
    whole = x.chunk(parts, 1) if parts > 1 else [x]  # LiteRT knows no split into one
    return [part.unflatten(1, (-1, HEAD_DIM)) for part in whole]


@fx_leaf
def _attend(qkv: Tensor, bias: Tensor, attn: CosineAttention) -> Tensor:
    """Mix the values of a map: queries, keys and values (B, H, W, 3C) to (B, N, C).

    Args:
        qkv: the projections.
        bias: of keys and queries, (G, N, N).
        attn: whose parameters are taken.
    """
    with ops.without_autocast(qkv):
        q, k, v = _split_heads(qkv.flatten(1, 2), 3)  # B G c N
        q = attn.queries(F.normalize(q, dim=2)) * math.log(ops.fixed(q.shape[3]))
        weights = (F.normalize(k, dim=2).mT @ q + bias).softmax(2)  # B G keys queries
        return (v @ weights).flatten(1, 2).mT.to(qkv.dtype)


@fx_leaf
def _aggregate(
    q: Tensor, kv: Tensor, pooled: Tensor, bias: Tensor, tables: Tables, attn: AggregatedAttention
) -> Tensor:
    """Mix the values of windows and of the pooled map for each position, to (B, N, C).

    Args:
        q: queries (B, H, W, C).
        kv: keys and values (B, H, W, 2C).
        pooled: those of the pooled map, (B, P, 2C).
        bias: of pooled keys and queries, (G, P, N).
        tables: of the map.
        attn: whose parameters are taken.
    """
    size, taps = q.shape[1:3], WINDOW**2
    with ops.without_autocast(q):
        (query,) = _split_heads(q.flatten(1, 2), 1)  # B G c N
        k, v = _split_heads(kv.flatten(1, 2), 2)
        far_k, far_v = _split_heads(pooled, 2)  # B G c P
        query, k, far_k = (F.normalize(x, dim=2) for x in (query, k, far_k))
        scaled = attn.queries(query) * tables.lengths
        maps = [x.flatten(0, 1).unflatten(2, size) for x in (scaled, k)]  # B*G c H W
        near = ops.small_kernel_correlation(maps[0], maps[1], WINDOW).view(*k.shape[:2], taps, -1)
        offset = attn.relative_pos_bias_local.to(k.dtype).unsqueeze(2) + tables.outside
        logits = torch.cat((near + offset, far_k.mT @ scaled + bias), 2)  # B G 9+P N
        near, far = logits.softmax(2).split((taps, far_k.shape[3]), 2)
        # Each tap has a further weight, which is no part of the softmax.
        tokens = attn.learnable_tokens.mT.to(k.dtype) @ query
        near = near + (tokens + attn.learnable_bias.mT.to(k.dtype))  # B G 9 N
        values, weights = v.flatten(0, 1).unflatten(2, size), near.flatten(0, 1).unflatten(2, size)
        mixed = ops.small_kernel_aggregation(values, weights).view_as(v)
        return (mixed + far_v @ far).flatten(1, 2).mT.to(q.dtype)
