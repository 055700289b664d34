"""SPANet: a token mixer that weighs low against high frequencies, and modulates with the result.

Source: "SPANet: Frequency-balancing Token Mixer using Spectral Pooling Aggregation Modulation"
(arXiv 2308.11568), section 3.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, GroupNorm1
from torch import Tensor, nn

from backbones import merge
from backbones.errors import CheckpointError, ConfigError
from backbones.layers import ChannelMlp, Head, fx_leaf
from backbones.ops import amplify_low_frequencies
from backbones.skeleton import StagedBackbone, StagePlan, Tensors

# The filters as the authors' code computes them, in float32: (factor of frequencies nearer to zero
# than the radius, of those beyond) of each share of the channels, and of those at the radius.
BALANCES = (
    (0.699999988079071, 0.30000001192092896),
    (0.800000011920929, 0.19999998807907104),
    (0.8999999761581421, 0.10000002384185791),
)
EDGE = 0.3333333432674408
RADII = (2, 2, 1, 1)  # in bins of the spectrum, whatever the size of the map
SCALED_FROM = 2  # the first stage whose shortcuts have a factor per channel

FILTER = re.compile(r"^stages\.(\d)\.blocks\.\d+\.token_mixer\.sps\.(\d)\.filter$")
AUTHORS = (
    (r"^patch_embed\.proj\.", "stem."),
    *((rf"^network\.{2 * i - 1}\.proj\.", f"stages.{i}.downsample.") for i in (1, 2, 3)),
    *((rf"^network\.{2 * i}\.", f"stages.{i}.blocks.") for i in range(4)),
    (r"\.token_mixer\.conv\.0\.", ".token_mixer.conv_w."),
    (r"\.token_mixer\.conv\.1\.", ".token_mixer.conv_h."),
    (r"\.res_scale(\d)\.scale$", r".res_scale\1"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)

balance_frequencies = fx_leaf(amplify_low_frequencies)


class SpectralMixer(nn.Module):
    """``proj_out(z * context(z))`` of ``z = 7x1(1x7(proj_in(x)))`` (equations 6 to 10).

    The context adds up 1x1 convolutions of three shares of z, each filtered by its own balance of
    low and high frequencies. A filter is the factor of the high ones times a map in which the low
    ones are amplified, (B, C, H, W) all through.
    """

    def __init__(self, dim: int, radius: int) -> None:
        super().__init__()
        share = -(-dim // len(BALANCES))
        self.split = [share, share, dim - 2 * share]
        self.radius = radius
        self.gains = tuple(
            (width, (low - high) / high, (EDGE - high) / high)
            for width, (low, high) in zip(self.split, BALANCES)
        )
        self.factors = [high for _, high in BALANCES]
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.conv_w = nn.Conv2d(dim, dim, (1, 7), padding=(0, 3), groups=dim)
        self.conv_h = nn.Conv2d(dim, dim, (7, 1), padding=(3, 0), groups=dim)
        self.pws = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in self.split)
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv_h(self.conv_w(self.proj_in(x)))
        balanced = balance_frequencies(z, self.radius, self.gains)
        return self.proj_out(z * self.context(balanced))

    def context(self, balanced: Tensor) -> Tensor:
        """Return the sum of the shares' convolutions, (B, C, H, W) to the same."""
        if len(self.pws) == 1:
            return self.pws[0](balanced)
        first, second, third = balanced.split(self.split, dim=1)  # torch.fx unpacks into names only
        shares = zip(self.pws, (first, second, third), self.factors)
        one, two, three = (conv(share * factor) for conv, share, factor in shares)
        return one + two + three

    def reparameterize(self) -> None:
        """Make the convolutions of the shares, and their factors, one convolution."""
        if len(self.pws) > 1:
            whole = merge.sum_linear_layers([*self.pws], self.factors)  # type: ignore[list-item]
            self.pws = nn.ModuleList([whole]).train(self.training)


class Block(nn.Module):
    """``x = s1 * x + token_mixer(norm1(x))``, ``x = s2 * x + mlp(norm2(x))``; figure 3.

    The factors s1 and s2 act on the shortcut, and exist where `scaled`.
    """

    def __init__(self, dim: int, radius: int, scaled: bool, drop_path: float) -> None:
        super().__init__()
        self.norm1: nn.Module = GroupNorm1(dim)
        self.token_mixer = SpectralMixer(dim, radius)
        self.res_scale1 = nn.Parameter(torch.ones(dim)) if scaled else None
        self.norm2: nn.Module = GroupNorm1(dim)
        self.mlp = ChannelMlp(dim, 4 * dim, use_conv=True)
        self.res_scale2 = nn.Parameter(torch.ones(dim)) if scaled else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop_path(self.token_mixer(self.norm1(x)))
        x = y + (x if self.res_scale1 is None else x * self.res_scale1.view(1, -1, 1, 1))
        y = self.drop_path(self.mlp(self.norm2(x)))
        return y + (x if self.res_scale2 is None else x * self.res_scale2.view(1, -1, 1, 1))

    def reparameterize(self) -> None:
        self.norm1 = merge.norm_into_next(self.norm1, self.token_mixer.proj_in)
        self.norm2 = merge.norm_into_next(self.norm2, self.mlp.fc1)


def spectral_filter(height: int, width: int, radius: int, balance: tuple[float, float]) -> Tensor:
    """Return a filter as the authors store it, (1, H, W), frequency zero at (H//2, W//2)."""
    rows = torch.arange(height).unsqueeze(1) - height // 2
    columns = torch.arange(width) - width // 2
    distance, (low, high) = rows**2 + columns**2, balance
    beyond = torch.full(distance.shape, high).masked_fill(distance == radius**2, EDGE)
    return beyond.masked_fill(distance < radius**2, low).unsqueeze(0)


class SPANet(StagedBackbone):
    """SPANet; see :class:`StagedBackbone` for the common arguments.

    Filters are constants and follow the map's size. The authors' code runs at one size only, and
    its form for detection agrees with this one where it keeps frequency zero in the center.

    Args:
        depths: blocks of each stage.
        dims: channels of each stage.

    Raises:
        ConfigError: too few channels for three shares.
    """

    first_conv = "stem"
    layouts = {"authors": AUTHORS}

    def __init__(self, depths: Sequence[int], dims: Sequence[int], **common: Any) -> None:
        super().__init__(dims, depths, **common)
        if any(dim <= 2 * -(-dim // len(BALANCES)) for dim in dims):
            raise ConfigError(f"dims: {list(dims)}; three shares need 3, 5 or more channels")
        self.assemble()

    def build_stem(self) -> nn.Module:
        return nn.Conv2d(self.in_chans, self.plans[0].dim, 7, stride=4, padding=2)

    def build_downsample(self, plan: StagePlan) -> nn.Module | None:
        if plan.index == 0:
            return None
        return nn.Conv2d(plan.in_dim, plan.dim, 3, stride=2, padding=1)

    def build_block(self, plan: StagePlan, index: int, drop_path: float) -> nn.Module:
        return Block(plan.dim, RADII[plan.index], plan.index >= SCALED_FROM, drop_path)

    def build_head(self, **common: Any) -> Head:
        dim = self.plans[-1].dim
        return Head(dim, maps={"norm": GroupNorm1(dim)}, **common)

    def init_layer(self, module: nn.Module, name: str) -> None:
        """Initialize as PyTorch does all convolutions but those of the MLP."""
        if isinstance(module, nn.Conv2d) and ".mlp." not in name:
            module.reset_parameters()
        else:
            super().init_layer(module, name)

    def complete_checkpoint(self, tensors: Tensors) -> Tensors:
        """Leave out the filters that the authors store, which are to be those computed here.

        Raises:
            CheckpointError: a filter of other values.
        """
        for key in list(tensors):
            if not (found := FILTER.match(key)):
                continue
            given, (stage, share) = tensors.pop(key), map(int, found.groups())
            if given.is_meta:
                continue
            height, width = given.shape[-2:]
            expected = spectral_filter(height, width, RADII[stage], BALANCES[share])
            if not torch.allclose(given.cpu().float(), expected, rtol=0, atol=1e-3):
                raise CheckpointError(
                    f"{key!r} is not the filter of radius {RADII[stage]} around frequency zero that"
                    " SPANet defines; the authors' code for detection displaces filters when the"
                    " size of images changes. If the file is from there, remove its entries that"
                    " end with .filter to load the rest with filters in place"
                )
        return tensors
