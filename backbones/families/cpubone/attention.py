"""Attention over a feature map that a convolution has mixed and reduced.

Source: CPUBone (arXiv 2603.26425).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import merge
from backbones.layers import attend

__all__ = ["ConvAttention", "padded"]


def padded(x: Tensor, stride: int) -> Tensor:
    """Pad (B, C, H, W) by zeros at the bottom and on the right to multiples of `stride`."""
    if stride == 1:
        return x
    return F.pad(x, (0, x.shape[-1] % stride, 0, x.shape[-2] % stride))


class ConvAttention(nn.Module):
    """Attention over what a depthwise 2x2 convolution has mixed and, at stride 2, reduced.

    The output is projected at the reduced size and then repeated. Odd sizes, which the authors'
    code cannot take, are padded by zeros at the bottom and on the right, as in timm.

    Args:
        dim: channels in and out.
        conv_proj: the depthwise convolution and its norm.
        stride: its stride: 2 to attend at half the size, 1 at the full one.
    """

    def __init__(self, dim: int, conv_proj: nn.Module, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.num_heads = max(1, dim // 2 // 30)
        self.head_dim = dim // self.num_heads // 2
        self.scale = self.head_dim**-0.5
        width = self.num_heads * self.head_dim
        self.conv_proj = conv_proj
        self.pwise = nn.Conv2d(dim, 3 * width, 1, bias=False)
        upsample = nn.Upsample(scale_factor=stride) if stride > 1 else nn.Identity()
        self.upsampling = nn.Sequential(nn.Conv2d(width, dim, 1), upsample)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2], x.shape[-1]
        x = self.pwise(self.conv_proj(padded(x, self.stride)))  # B G*3*c H/stride W/stride
        # The channels of one head are its queries, keys and values, in this order.
        heads = x.reshape(x.shape[0], self.num_heads, 3 * self.head_dim, -1).transpose(-2, -1)
        q, k, v = heads.chunk(3, dim=-1)  # each B G N c
        mixed = attend(q, k, v, self.scale).transpose(-2, -1)
        # B G c N to B G*c H/stride W/stride, projected and upsampled to B C H W
        x = self.upsampling(mixed.reshape(x.shape[0], -1, x.shape[-2], x.shape[-1]))
        return x[..., :height, :width] if self.stride > 1 else x

    def reparameterize(self) -> None:
        """Fold norm, scale and the biases of keys and values."""
        merge.fold_chain(self, ("conv_proj", "pwise"))
        part = torch.arange(self.pwise.out_channels) // self.head_dim % 3  # query, key or value
        self.scale = merge.factor_into_outputs(self.pwise, self.scale, part == 0)
        merge.drop_softmax_bias(self.pwise, part == 1)
        merge.uniform_bias_into_next(self.pwise, part == 2, self.upsampling[0])
