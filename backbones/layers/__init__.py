"""Parts that two or more families use."""

from backbones.layers.branched_conv import (
    BRANCHED_CONV_LAYOUT,
    BranchedConv,
    split_merged_kernels,
)
from backbones.layers.chain import CenteringChain, Chain
from backbones.layers.conv_norm import bias_as_norm, conv_norm
from backbones.layers.convnext_names import CONVNEXT_LAYOUT, PYRAMID_LAYOUT, TRANSFORMERS_LAYOUT
from backbones.layers.downsample import norm_conv_downsample
from backbones.layers.head import Head
from backbones.layers.mlp import ChannelMlp
from backbones.layers.norm import (
    CenteredNorm2d,
    GlobalResponseNorm,
    scaled,
    statistics_dtype,
    to_unit_variance,
)
from backbones.layers.tracing import fx_leaf

__all__ = [
    "BRANCHED_CONV_LAYOUT",
    "CONVNEXT_LAYOUT",
    "PYRAMID_LAYOUT",
    "TRANSFORMERS_LAYOUT",
    "BranchedConv",
    "CenteredNorm2d",
    "CenteringChain",
    "Chain",
    "ChannelMlp",
    "GlobalResponseNorm",
    "Head",
    "bias_as_norm",
    "conv_norm",
    "fx_leaf",
    "norm_conv_downsample",
    "scaled",
    "split_merged_kernels",
    "statistics_dtype",
    "to_unit_variance",
]
