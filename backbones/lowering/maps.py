"""Blocks that move the channels to the end and back, as blocks on maps (B, C, H, W)."""

from __future__ import annotations

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from backbones.layers import ChannelMlp, GlobalResponseNorm

__all__ = ["MapBlock", "mlp_on_maps", "norm_on_maps"]


class MapBlock(nn.Module):
    """``x + mixer(norm1(x))``, then ``x + mlp(norm2(x))``."""

    def __init__(
        self, norm1: nn.Module, mixer: nn.Module, norm2: nn.Module, mlp: nn.Module
    ) -> None:
        super().__init__()
        self.norm1, self.mixer, self.norm2, self.mlp = norm1, mixer, norm2, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def norm_on_maps(norm: nn.Module) -> LayerNorm2d:
    """Return a layer norm over the last axis as one over the channels of maps."""
    if not isinstance(norm, nn.LayerNorm):
        raise TypeError(f"{type(norm).__name__} is no layer norm")
    twin = LayerNorm2d(norm.normalized_shape[0], eps=norm.eps, affine=norm.elementwise_affine)
    twin.weight, twin.bias = norm.weight, norm.bias
    return twin.train(norm.training)


def mlp_on_maps(mlp: ChannelMlp) -> ChannelMlp:
    """Let a channel mixer compute on maps, in place."""
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
