"""The downsampling between the stages of the ConvNeXt line."""

from __future__ import annotations

from timm.layers import create_conv2d
from torch import nn

from backbones.layers.chain import Chain

__all__ = ["norm_conv_downsample"]


def norm_conv_downsample(
    norm: nn.Module, in_dim: int, dim: int, *, stride: int = 2, first_dilation: int = 1
) -> Chain:
    """Return `norm` followed by an unpadded 2x2 convolution of stride 2, with bias.

    Where a stride is traded for dilation (``stride=1``) the convolution keeps the size instead.
    """
    padding = 0 if stride > 1 else "same"
    conv = create_conv2d(
        in_dim, dim, 2, stride=stride, dilation=first_dilation, padding=padding, bias=True
    )
    return Chain(norm, conv)
