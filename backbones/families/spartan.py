"""SpaRTAN: two-scale spatial mixing and channel mixing that broadcasts one token's features.

Source: "SpaRTAN: Spatial Reinforcement Token-based Aggregation Network for Visual Recognition"
(arXiv 2507.10999) and the authors' code.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, GroupNorm1, LayerScale2d, SqueezeExcite
from torch import Tensor, nn

from backbones import merge
from backbones.config import PerStage
from backbones.errors import ConfigError
from backbones.layers import Chain, Head, conv_norm, init_by_fan_out
from backbones.skeleton import StagedBackbone, StagePlan, Tensors, per_stage

EPS = 1e-6


class SpatialMixer(nn.Module):
    """Contrast with the image's mean, then a plain and a dilated branch on half the channels."""

    def __init__(self, dim: int, depthwise: bool, init_value: float) -> None:
        super().__init__()
        half = dim // 2
        groups = half if depthwise else 1
        self.proj_in = nn.Conv2d(dim, half, 1)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.full((half,), init_value))
        self.contrast: nn.Module = nn.Identity()  # `gamma` as a convolution, once merged
        self.conv_h = conv_norm(half, half, 3, groups=groups, eps=EPS, act=nn.GELU())
        self.conv_l = Chain(
            nn.Conv2d(half, half, 3, padding=2, dilation=2, groups=groups, bias=False),
            conv_norm(half, half, 3, dilation=2, groups=groups, eps=EPS, act=nn.GELU()),
        )
        self.se_h = SqueezeExcite(half, rd_channels=dim // 8)
        self.se_l = SqueezeExcite(half, rd_channels=dim // 8)
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj_in(x)  # B C/2 H W
        if self.gamma is not None:
            y = y + self.gamma.view(1, -1, 1, 1) * (y - y.mean((2, 3), keepdim=True))
        else:
            y = y + self.contrast(x.mean((2, 3), keepdim=True))
        mixed = self.se_h(self.conv_h(y)), self.se_l(self.conv_l(y))
        return self.proj_out(torch.cat(mixed, dim=1))  # B C H W

    def reparameterize(self) -> None:
        """Fold the norms, and the contrast: with W' = (1 + g) W, minus g W on the mean."""
        merge.fold_chain(self.conv_h)
        merge.fold_chain(self.conv_l)
        if self.gamma is not None:
            self.contrast = merge.split_contrast(self.proj_in, self.gamma)
            self.gamma = None


class ChannelMixer(nn.Module):
    """Add the feature of each position's strongest channel to all, rotate pairs, mix and reduce.

    Channels (2k, 2k + 1) are the real and imaginary part of a complex number, which is multiplied
    by row k of `rotation`; its modulus is free. Ties for the strongest go to the first channel.
    """

    def __init__(self, dim: int, hidden_dim: int, groups: int) -> None:
        super().__init__()
        self.theta: nn.Module = nn.Conv2d(dim, hidden_dim, 1)
        self.act = nn.GELU()
        self.proj = nn.Conv2d(dim, hidden_dim, 1)
        self.rotation: nn.Parameter | None = nn.Parameter(torch.empty(hidden_dim // 2, 2))
        self.conv = conv_norm(hidden_dim, hidden_dim, 3, groups=groups, eps=EPS, act=nn.GELU())
        self.se = SqueezeExcite(hidden_dim, rd_channels=dim // 4)
        self.proj_out = nn.Conv2d(hidden_dim, dim, 1)

    def rotate(self, x: Tensor) -> Tensor:
        """Multiply the complex numbers in (B, D, H, W), in real arithmetic."""
        if self.rotation is None:
            return x
        rotation = self.rotation.to(x.dtype)
        real = rotation[:, :1, None, None]
        imaginary = rotation[:, 1:, None, None]
        pairs = x.unflatten(1, (-1, 2))  # B D/2 2 H W
        turned = pairs.flip(2) * torch.cat((-imaginary, imaginary), dim=1)
        return (pairs * real + turned).flatten(1, 2)  # B D H W

    def forward(self, x: Tensor) -> Tensor:
        strongest = x.argmax(dim=1, keepdim=True)  # B 1 H W
        if isinstance(self.theta, nn.Identity):
            value, gate = self.proj(x).chunk(2, dim=1)  # each B D H W
        else:
            value, gate = self.proj(x), self.theta(x)
        token = value * self.act(gate)
        token = token + token.gather(1, strongest)
        return self.proj_out(self.se(self.conv(self.rotate(token))))  # B C H W

    def reparameterize(self) -> None:
        """Fold the norm and the rotation into the convolution, and make the two projections one."""
        merge.fold_chain(self.conv)
        if self.rotation is not None:
            self.conv.conv = merge.rotation_into_next(self.rotation, self.conv.conv)
            self.rotation = None
        if isinstance(self.theta, nn.Conv2d):
            self.proj = merge.stack_linear_layers(self.proj, self.theta)
            self.theta = nn.Identity()


class Block(nn.Module):
    """``x += ls1(spatial(norm1(x)))``, ``x += ls2(channel(norm2(x)))``.

    Each norm takes its statistics over all channels and positions of an image.
    """

    def __init__(
        self, dim: int, hidden_dim: int, early: bool, ls_init_value: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1: nn.Module = GroupNorm1(dim, eps=EPS)
        self.spatial = SpatialMixer(dim, depthwise=not early, init_value=ls_init_value)
        self.ls1: nn.Module = LayerScale2d(dim, ls_init_value)
        self.norm2 = GroupNorm1(dim, eps=EPS)
        self.channel = ChannelMixer(dim, hidden_dim, groups=hidden_dim if early else dim)
        self.ls2: nn.Module = LayerScale2d(dim, ls_init_value)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.spatial(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.channel(self.norm2(x))))

    def reparameterize(self) -> None:
        # The second norm keeps its factor and offset: they take part in the choice of a channel.
        self.norm1 = merge.norm_into_next(self.norm1, self.spatial.proj_in)
        self.spatial.reparameterize()
        for name, mixer in (("ls1", self.spatial), ("ls2", self.channel)):
            if isinstance(scale := getattr(self, name), LayerScale2d):
                merge.scale_into_previous(mixer.proj_out, scale.gamma)
                setattr(self, name, nn.Identity())


def from_authors(tensors: Tensors, model: Any = None) -> Tensors:
    """Rename the authors' keys, whose `layers` count blocks and downsamplings in one row."""
    rules = (
        (r"^conv\.", "stem."),
        (r"^linear\.", "head.fc."),
        (r"\.scale_(\d)$", r".ls\1.gamma"),
        (r"\.norm_(\d)\.", r".norm\1."),
        (r"\.smixer\.", ".spatial."),
        (r"\.cmixer\.", ".channel."),
        (r"\.l_conv\.0\.conv\.", ".conv_l.0."),
        (r"\.([hl])_conv\.", r".conv_\1."),
        (r"\.([hl])_attn\.", r".se_\1."),
        (r"\.attn\.", ".se."),
        (r"\.squeeze\.", ".fc1."),
        (r"\.expand\.", ".fc2."),
        (r"\.complex$", ".rotation"),
    )
    downs = sorted({int(m[1]) for k in tensors if (m := re.match(r"layers\.(\d+)\.conv\.", k))})
    renamed: Tensors = {}
    for key, tensor in tensors.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        if match := re.match(r"layers\.(\d+)\.", key):
            place = int(match[1])
            stage = bisect_right(downs, place)
            index = place - downs[stage - 1] - 1 if stage else place  # -1: the downsampling itself
            part = f"blocks.{index}" if index >= 0 else "downsample"
            key = f"stages.{stage}.{part}.{key[match.end() :]}"
        renamed[key] = tensor
    return renamed


class SpaRTAN(StagedBackbone):
    """SpaRTAN; see :class:`StagedBackbone` for the common arguments.

    The first half of the stages mixes space densely and channels depthwise, the second half mixes
    space depthwise and channels in groups.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage, multiples of 8.
        expand_ratios: expansion of the channel mixer, even.
        ls_init_value: initial layer scale and initial contrast.

    Raises:
        ConfigError: channels or an expansion of another kind.
    """

    first_conv = "stem.0.conv"
    layouts = {"authors": from_authors}

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        expand_ratios: PerStage[int] = (4, 4, 2, 2),
        ls_init_value: float = 1e-5,
        **common: Any,
    ) -> None:
        super().__init__(dims, depths, **common)
        self.expand_ratios = per_stage(expand_ratios, len(dims), "expand_ratios")
        self.ls_init_value = ls_init_value
        if any(dim % 8 for dim in dims):
            raise ConfigError(f"dims: {list(dims)} must be multiples of 8")
        if any(ratio % 2 or ratio < 2 for ratio in self.expand_ratios):
            raise ConfigError(f"expand_ratios: {self.expand_ratios} must be even and positive")
        self.assemble()

    def build_stem(self) -> nn.Module:
        dim = self.plans[0].dim
        return Chain(
            conv_norm(self.in_chans, dim // 2, 3, stride=2, eps=EPS, act=nn.GELU()),
            conv_norm(dim // 2, dim, 3, stride=2, eps=EPS, act=nn.GELU()),
        )

    def build_downsample(self, plan: StagePlan) -> nn.Module | None:
        if plan.index == 0:
            return None
        return conv_norm(plan.in_dim, plan.dim, 2, stride=2, padding=0, eps=EPS, act=nn.SiLU())

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        early = plan.index < len(self.plans) // 2
        hidden_dim = self.expand_ratios[plan.index] * plan.dim
        return Block(plan.dim, hidden_dim, early, self.ls_init_value, drop_path)

    def build_head(self, **common: Any) -> Head:
        return Head(self.plans[-1].dim, **common)

    def drop_path_rates(self) -> list[list[float]]:
        """Return the rates by stage: block b of n has b/n of the rate, so none reaches it."""
        count = sum(plan.depth for plan in self.plans)
        rates = iter(self.drop_path_rate * b / count for b in range(count))
        return [[next(rates) for _ in range(plan.depth)] for plan in self.plans]

    def init_layer(self, module: nn.Module, name: str) -> None:
        """Initialize convolutions by their fan-out and rotations as standard normal."""
        if isinstance(module, nn.Conv2d):
            init_by_fan_out(module)
        elif isinstance(module, ChannelMixer):
            nn.init.normal_(module.get_parameter("rotation"))
        else:
            super().init_layer(module, name)
