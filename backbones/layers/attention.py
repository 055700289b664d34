"""Scaled dot-product attention with all its derivatives, and as a layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import merge
from backbones.layers.tracing import fx_leaf

__all__ = ["SelfAttention", "attend"]


@fx_leaf
def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return what queries (B, G, N, c) take of values.

    PyTorch's kernel for CPUs has no second derivative.
    """
    if torch.is_grad_enabled() and q.device.type == "cpu":
        return (q @ k.mT * scale).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


class SelfAttention(nn.Module):
    """Multi-head self-attention of a sequence (B, N, C), without any table of positions.

    Args:
        dim: channels.
        head_dim: channels of a head; divides `dim`.
    """

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = dim // head_dim
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(*self.heads(x))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of a sequence (B, N, C), each (B, G, N, C / G)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # B N G c
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention's outputs, (B, N, C)."""
        mixed = attend(q, k, v, self.scale)  # B G N c
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def reparameterize(self) -> None:
        """Fold the scale into the queries; drop the bias of keys, move that of values."""
        dim = self.qkv.in_features
        self.scale = merge.factor_into_outputs(self.qkv, self.scale, slice(0, dim))
        merge.drop_softmax_bias(self.qkv, slice(dim, 2 * dim))
        if self.proj.bias is not None:  # else it has moved on, and nothing follows it
            merge.uniform_bias_into_next(self.qkv, slice(2 * dim, None), self.proj)
