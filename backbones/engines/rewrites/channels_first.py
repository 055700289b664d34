"""Blocks that move the channels to the end and back, as blocks on feature maps (B, C, H, W)."""

from timm.layers import LayerNorm2d
from torch import nn

from backbones.families import convnext
from backbones.layers import ChannelMlp, GlobalResponseNorm

__all__ = ["convnext_block_channels_first", "mlp_channels_first", "norm_channels_first"]


def convnext_block_channels_first(block: convnext.Block) -> convnext.Block:
    """Let a block of ConvNeXt leave the channels where they are, in place."""
    if block.channels_last:
        block.channels_last = False
        block.norm, block.mlp = norm_channels_first(block.norm), mlp_channels_first(block.mlp)
    return block


def norm_channels_first(norm: nn.Module) -> LayerNorm2d:
    """Return a layer norm over the last axis as one over the channels of feature maps."""
    if not isinstance(norm, nn.LayerNorm):
        raise TypeError(f"{type(norm).__name__} is no layer norm")
    twin = LayerNorm2d(norm.normalized_shape[0], eps=norm.eps, affine=norm.elementwise_affine)
    twin.weight, twin.bias = norm.weight, norm.bias
    return twin.train(norm.training)


def mlp_channels_first(mlp: ChannelMlp) -> ChannelMlp:
    """Let a channel mixer compute on feature maps, in place."""
    mlp.fc1, mlp.fc2 = _conv_of(mlp.fc1), _conv_of(mlp.fc2)
    if isinstance(old := mlp.grn, GlobalResponseNorm):
        mlp.grn = GlobalResponseNorm(len(old.weight), channels_last=False, eps=old.eps)
        mlp.grn.weight, mlp.grn.bias = old.weight, old.bias
    return mlp


def _conv_of(linear: nn.Module) -> nn.Conv2d:
    """Return a linear layer as a 1x1 convolution."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{type(linear).__name__} is no linear layer")
    conv = nn.Conv2d(
        linear.in_features, linear.out_features, 1, bias=linear.bias is not None, device="meta"
    )
    conv.weight = nn.Parameter(linear.weight.detach()[..., None, None])
    if linear.bias is not None:
        conv.bias = nn.Parameter(linear.bias.detach())
    return conv
