"""Parts that two or more families use."""

from backbones.layers.conv_mlp import ConvMlp, ResidualConv
from backbones.layers.conv_norm import conv_norm
from backbones.layers.dcls import SpacedConv
from backbones.layers.dilated_reparam import DILATED_REPARAM_LAYOUT, DilatedReparamConv
from backbones.layers.downsample import norm_conv_downsample
from backbones.layers.dynamic_conv import DynamicConv
from backbones.layers.head import Head
from backbones.layers.layer_scale import LayerScale
from backbones.layers.mlp import ChannelMlp
from backbones.layers.norm import GlobalResponseNorm, statistics_dtype
from backbones.layers.tracing import fx_leaf

__all__ = [
    "DILATED_REPARAM_LAYOUT",
    "ChannelMlp",
    "ConvMlp",
    "DilatedReparamConv",
    "DynamicConv",
    "GlobalResponseNorm",
    "Head",
    "LayerScale",
    "ResidualConv",
    "SpacedConv",
    "conv_norm",
    "fx_leaf",
    "norm_conv_downsample",
    "statistics_dtype",
]
