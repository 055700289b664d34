"""Parts that two or more families use."""

from backbones.layers.downsample import norm_conv_downsample
from backbones.layers.head import Head
from backbones.layers.mlp import ChannelMlp
from backbones.layers.norm import GlobalResponseNorm, statistics_dtype

__all__ = ["ChannelMlp", "GlobalResponseNorm", "Head", "norm_conv_downsample", "statistics_dtype"]
