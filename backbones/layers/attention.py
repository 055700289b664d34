"""Scaled dot-product attention with all its derivatives."""

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.layers.tracing import fx_leaf

__all__ = ["attend"]


@fx_leaf
def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return what queries (B, G, N, c) take of values.

    PyTorch's kernel for CPUs has no second derivative.
    """
    if torch.is_grad_enabled() and q.device.type == "cpu":
        return (q @ k.mT * scale).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, scale=scale)
