"""UniFormer's two blocks: local affinity by convolution, global affinity by attention.

Source: "UniFormer: Unifying Convolution and Self-attention for Visual Recognition" (arXiv
2201.09450), section 3. Both begin with a depthwise convolution for the position (equation 8).
"""

import torch
from timm.layers import DropPath, LayerNorm
from torch import Tensor, nn

from backbones import merge
from backbones.layers import ChannelMlp, ResidualConv, SelfAttention, statistics_dtype

__all__ = ["Attention", "AttentionBlock", "ConvBlock", "scaled"]

EPS = 1e-6  # of the layer norms in blocks; those of the patch embeddings have PyTorch's


def _layer_scale(dim: int, init_value: float | None) -> nn.Parameter | None:
    """Return a layer scale (C,), or None where the stage has none."""
    return None if init_value is None else nn.Parameter(torch.full((dim,), init_value))


class ConvBlock(nn.Module):
    """``x += conv2(conv_dw(conv1(norm1(x))))`` and an MLP, for stages of high resolution.

    Source: section 3.2, local MHRA (equation 6). No activation stands between the convolutions.

    Args:
        dim: channels.
        mlp_ratio: expansion of the MLP.
        init_value: initial layer scale; None for none.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self, dim: int, mlp_ratio: float, init_value: float | None, drop_path: float
    ) -> None:
        super().__init__()
        self.pos_conv: nn.Conv2d = ResidualConv(dim)
        self.norm1: nn.Module = nn.BatchNorm2d(dim)
        self.conv1 = nn.Conv2d(dim, dim, 1)
        self.conv_dw = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv2 = nn.Conv2d(dim, dim, 1)
        self.gamma1 = _layer_scale(dim, init_value)
        self.norm2: nn.Module = nn.BatchNorm2d(dim)
        self.mlp = ChannelMlp(dim, int(dim * mlp_ratio), use_conv=True)
        self.gamma2 = _layer_scale(dim, init_value)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_conv(x)
        y = self.conv2(self.conv_dw(self.conv1(self.norm1(x))))  # B C H W
        if self.gamma1 is not None:
            y = y * self.gamma1.view(1, -1, 1, 1)
        x = x + self.drop_path(y)
        y = self.mlp(self.norm2(x))
        if self.gamma2 is not None:
            y = y * self.gamma2.view(1, -1, 1, 1)
        return x + self.drop_path(y)

    def reparameterize(self) -> None:
        merge.fold_chain(self, ("pos_conv",))
        self.norm1 = merge.norm_into_next(self.norm1, self.conv1)
        merge.shift_into_next(self.conv_dw.bias, self.conv2)
        self.conv_dw.bias = None
        merge.scale_into_previous(self.conv2, self.gamma1)
        self.norm2 = merge.norm_into_next(self.norm2, self.mlp.fc1)
        merge.scale_into_previous(self.mlp.fc2, self.gamma2)
        self.gamma1 = self.gamma2 = None


class Attention(SelfAttention):
    """Self-attention that can tell what a class token attends to."""

    def first_row(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the attention of the first query, the mean over heads, (B, N).

        In at least float32, also under autocast, since its values are compared with each other.
        """
        dtype = statistics_dtype(q)
        logits = (q[:, :, :1].to(dtype) * k.to(dtype)).sum(-1) * self.scale  # B G N
        return logits.softmax(-1).mean(1)


class AttentionBlock(nn.Module):
    """``x += attn(norm1(x))`` and an MLP over tokens, for stages of low resolution.

    Source: section 3.2, global MHRA (equation 7).

    Args:
        dim: channels.
        head_dim: channels of a head.
        mlp_ratio: expansion of the MLP.
        init_value: initial layer scale; None for none.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        mlp_ratio: float,
        init_value: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.pos_conv: nn.Conv2d = ResidualConv(dim)
        self.norm1: nn.Module = LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, head_dim)
        self.gamma1 = _layer_scale(dim, init_value)
        self.norm2: nn.Module = LayerNorm(dim, eps=EPS)
        self.mlp = ChannelMlp(dim, int(dim * mlp_ratio))
        self.gamma2 = _layer_scale(dim, init_value)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_conv(x)  # B C H W
        size = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # B N C
        x = x + self.drop_path(scaled(self.attn(self.norm1(x)), self.gamma1))
        x = x + self.drop_path(self.mix_channels(x))
        return x.transpose(1, 2).unflatten(2, size)  # B C H W

    def mix_channels(self, x: Tensor) -> Tensor:
        """Return what the MLP adds to a sequence (B, N, C)."""
        return scaled(self.mlp(self.norm2(x)), self.gamma2)

    def reparameterize(self) -> None:
        merge.fold_chain(self, ("pos_conv",))
        self.norm1 = merge.norm_into_next(self.norm1, self.attn.qkv)
        self.attn.reparameterize()
        merge.scale_into_previous(self.attn.proj, self.gamma1)
        self.norm2 = merge.norm_into_next(self.norm2, self.mlp.fc1)
        merge.scale_into_previous(self.mlp.fc2, self.gamma2)
        self.gamma1 = self.gamma2 = None


def scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    """Multiply a sequence (B, N, C) by a layer scale, where there is one."""
    return x if gamma is None else x * gamma
