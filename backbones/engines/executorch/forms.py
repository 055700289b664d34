"""Modules in the operations that XNNPACK has kernels for, and fast ones.

XNNPACK knows means over positions only, and no norms: each would leave it for a portable kernel and
come back, with two changes of layout. Its depthwise convolutions have kernels for up to 25 taps;
larger ones run as many small products, which take several times as long as a sum of small kernels.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import GroupNorm1, LayerNorm, LayerNorm2d
from torch import Tensor, nn

from backbones.engines.rewrites import rewrite_for_graphs, split_large_kernel
from backbones.families.unireplknet import CenteredNorm2d
from backbones.layers import GlobalResponseNorm

__all__ = [
    "ChannelMean",
    "DecomposedGroupNorm",
    "DecomposedNorm",
    "DecomposedResponseNorm",
    "for_xnnpack",
]


def for_xnnpack(model: nn.Module) -> nn.Module:
    """Return a copy of a model in eval mode whose modules XNNPACK runs fast; exact."""
    clone = rewrite_for_graphs(model)
    clone = _replace_children(copy.deepcopy(model) if clone is model else clone)
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    for module in clone.modules():
        if isinstance(module, ChannelMean):
            module.to(dtype)
    return clone


def _replace_children(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        form = _FORMS.get(type(child))
        if form is not None:
            module._modules[name] = form(child)
        else:
            _replace_children(child)
    return module


class ChannelMean(nn.Module):
    """The mean over channels as a convolution or linear layer, plus a constant.

    Over maps (B, C, H, W) it is (B, 1, H, W); over the last axis of (..., C) it is (..., 1). Over
    several groups of a map's channels each channel gets the mean of its group.
    """

    def __init__(
        self, channels: int, constant: float = 0.0, *, maps: bool, groups: int = 1
    ) -> None:
        super().__init__()
        kind: Any = partial(nn.Conv2d, kernel_size=1, groups=groups) if maps else nn.Linear
        mean = kind(channels, groups, dtype=torch.float64)  # exact until the model's type is known
        nn.init.constant_(mean.weight, groups / channels)
        nn.init.constant_(mean.bias, constant)
        self.mean = mean.requires_grad_(False)
        self.spread: nn.Module = nn.Identity()
        if groups > 1:
            spread = kind(groups, channels, bias=False, dtype=torch.float64)
            nn.init.ones_(spread.weight)
            self.spread = spread.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.spread(self.mean(x))


class DecomposedNorm(nn.Module):
    """A norm over channels, with `whole` also over positions, by arithmetic on whole maps.

    It takes over the parameters of `norm`; `centered` says that the mean is zero already. With
    `whole` there may be several groups of channels.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self, norm: Any, *, maps: bool = True, whole: bool = False, centered: bool = False
    ) -> None:
        super().__init__()
        channels = norm.num_channels if whole else _channels_of(norm)
        groups = norm.num_groups if whole else 1
        over: Any = partial(ChannelMean, channels, maps=maps, groups=groups)
        self.whole = whole
        self.mean = None if centered else over()
        self.variance = over(norm.eps)
        shape = (1, -1, 1, 1) if maps else (-1,)
        for name in ("weight", "bias"):
            values = getattr(norm, name)
            self.register_buffer(name, None if values is None else values.detach().view(shape))

    def forward(self, x: Tensor) -> Tensor:
        if self.mean is not None:
            x = x - self.mean(self._over_positions(x))
        x = x * self.variance(self._over_positions(x * x)).rsqrt()
        if self.weight is not None:
            x = x * self.weight
        return x if self.bias is None else x + self.bias

    def _over_positions(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True) if self.whole else x


def _channels_of(norm: Any) -> int:
    """Return the number of channels of a norm with a weight or a shape."""
    if isinstance(norm, nn.LayerNorm):
        return int(norm.normalized_shape[0])
    return len(norm.weight)


class DecomposedGroupNorm(nn.Module):
    """A group norm, of maps (B, C, H, W) by arithmetic; it takes over the parameters."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.of_maps, self.of_others = DecomposedNorm(norm, whole=True), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.of_maps(x) if x.ndim == 4 else self.of_others(x)


class DecomposedResponseNorm(nn.Module):
    """A global response norm of maps (B, C, H, W) by means; it takes over the parameters."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, norm: GlobalResponseNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.mean = ChannelMean(len(norm.weight), maps=True)
        self.register_buffer("weight", norm.weight.detach().view(1, -1, 1, 1))
        bias = norm.bias
        self.register_buffer("bias", None if bias is None else bias.detach().view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        # Of the root of a mean where the norm has that of a sum: the same ratio, but for eps.
        energy = (x * x).mean((2, 3), keepdim=True).sqrt()  # B C 1 1
        places = x.shape[2] * x.shape[3]
        eps: Any = self.eps
        if isinstance(places, int):
            eps = eps / places**0.5
        else:  # of free sizes a program has products, but no roots
            eps = eps * torch.scalar_tensor(places, dtype=x.dtype).rsqrt()
        x = x * (1 + self.weight * (energy / (self.mean(energy) + eps)))
        return x if self.bias is None else x + self.bias


def _response_norm(norm: GlobalResponseNorm) -> nn.Module:
    """Return a response norm of maps in plain operations; one with the channels last as it is."""
    return norm if norm.channel_axis == -1 else DecomposedResponseNorm(norm)


def _of_last_axis(norm: nn.LayerNorm) -> nn.Module:
    """Return a layer norm over the last axis in plain operations; one over more as it is."""
    return DecomposedNorm(norm, maps=False) if len(norm.normalized_shape) == 1 else norm


_FORMS: Mapping[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.Conv2d: split_large_kernel,
    LayerNorm2d: DecomposedNorm,
    CenteredNorm2d: lambda norm: DecomposedNorm(norm, centered=True),
    GlobalResponseNorm: _response_norm,
    GroupNorm1: DecomposedGroupNorm,
    nn.GroupNorm: DecomposedGroupNorm,
    LayerNorm: _of_last_axis,
    nn.LayerNorm: _of_last_axis,
}
