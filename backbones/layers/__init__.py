"""Parts that two or more families use, and parts of one that read well on their own."""

from backbones.layers.branched_conv import (
    BRANCHED_CONV_LAYOUT,
    BranchedConv,
    split_merged_kernels,
)
from backbones.layers.chain import CenteringChain, Chain
from backbones.layers.conv_mlp import ConvMlp, ResidualConv
from backbones.layers.conv_norm import bias_as_norm, conv_norm
from backbones.layers.dcls import SpacedConv
from backbones.layers.downsample import norm_conv_downsample
from backbones.layers.dynamic_conv import DynamicConv
from backbones.layers.head import Head
from backbones.layers.layer_scale import LayerScale
from backbones.layers.mlp import ChannelMlp
from backbones.layers.norm import GlobalResponseNorm, statistics_dtype
from backbones.layers.tracing import fx_leaf

__all__ = [
    "BRANCHED_CONV_LAYOUT",
    "BranchedConv",
    "CenteringChain",
    "Chain",
    "ChannelMlp",
    "ConvMlp",
    "DynamicConv",
    "GlobalResponseNorm",
    "Head",
    "LayerScale",
    "ResidualConv",
    "SpacedConv",
    "bias_as_norm",
    "conv_norm",
    "fx_leaf",
    "norm_conv_downsample",
    "split_merged_kernels",
    "statistics_dtype",
]
