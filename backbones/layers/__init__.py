"""Parts that two or more families use."""

from backbones.layers.attention import SelfAttention, attend
from backbones.layers.branched_conv import (
    BRANCHED_CONV_LAYOUT,
    BranchedConv,
    split_merged_kernels,
)
from backbones.layers.cached import CachedTensor
from backbones.layers.chain import Chain, bias_as_norm, conv_norm, norm_conv_downsample
from backbones.layers.head import Head
from backbones.layers.initial_values import init_by_fan_out
from backbones.layers.layouts import CONVNEXT_LAYOUT, PYRAMID_LAYOUT
from backbones.layers.mlp import ChannelMlp
from backbones.layers.norm import GlobalResponseNorm, VectorBatchNorm, statistics_dtype
from backbones.layers.residual_conv import ResidualConv
from backbones.layers.token_head import NormHead, TokenHead
from backbones.layers.tracing import fx_leaf

__all__ = [
    "BRANCHED_CONV_LAYOUT",
    "CONVNEXT_LAYOUT",
    "PYRAMID_LAYOUT",
    "BranchedConv",
    "CachedTensor",
    "Chain",
    "ChannelMlp",
    "GlobalResponseNorm",
    "Head",
    "NormHead",
    "ResidualConv",
    "SelfAttention",
    "TokenHead",
    "VectorBatchNorm",
    "attend",
    "bias_as_norm",
    "conv_norm",
    "fx_leaf",
    "init_by_fan_out",
    "norm_conv_downsample",
    "split_merged_kernels",
    "statistics_dtype",
]
