"""HorNet's blocks without permutations, and its gated convolutions with fewer splits."""

import itertools

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from backbones.engines.rewrites.channels_first import mlp_channels_first, norm_channels_first
from backbones.engines.rewrites.convolutions import select_outputs
from backbones.families.hornet import Block, GatedConv, GlobalLocalFilter
from backbones.layers import statistics_dtype

__all__ = ["ChannelsFirstBlock", "FilteredGates", "HalvesNorm", "SeparateGates", "separate_gates"]


class ChannelsFirstBlock(nn.Module):
    """``x + mixer(norm1(x))``, then ``x + mlp(norm2(x))``, all on feature maps (B, C, H, W)."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.mixer = block.norm1, block.gnconv
        self.norm2, self.mlp = norm_channels_first(block.norm2), mlp_channels_first(block.mlp)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def separate_gates(conv: GatedConv, decompose: bool) -> nn.Module:
    """Return a gated convolution with fewer splits; one with a filter, if norms may be split."""
    if isinstance(conv.mixer, nn.Conv2d):
        return SeparateGates(conv)
    return FilteredGates(conv) if decompose else conv


class SeparateGates(nn.Module):
    """The gated convolution without splits: a projection and depthwise convolution for each gate.

    `conv` is re-parameterized, with a depthwise convolution as its mixer; it is used up.
    """

    def __init__(self, conv: GatedConv) -> None:
        super().__init__()
        dims, mixer = conv.dims, conv.mixer
        if not isinstance(mixer, nn.Conv2d):
            raise TypeError(f"{type(mixer).__name__} is no convolution")
        self.first = select_outputs(conv.proj_in, slice(0, dims[0]))
        rest = select_outputs(conv.proj_in, slice(dims[0], None))
        ends = list(itertools.accumulate(dims))
        parts = [slice(end - dim, end) for dim, end in zip(dims, ends)]
        self.gates = nn.ModuleList(
            nn.Sequential(select_outputs(rest, part), select_outputs(mixer, part)) for part in parts
        )
        self.pws, self.proj_out = conv.pws, conv.proj_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * self.gates[0](x)
        for project, gate in zip(self.pws, self.gates[1:]):
            y = project(y) * gate(x)
        return self.proj_out(y)


class FilteredGates(nn.Module):
    """The gated convolution with a projection each for first factor, local and global channels.

    `conv` is re-parameterized, with a global and local filter as its mixer; it is used up.
    """

    def __init__(self, conv: GatedConv) -> None:
        super().__init__()
        mixer = conv.mixer
        if not isinstance(mixer, GlobalLocalFilter):
            raise TypeError(f"{type(mixer).__name__} is no global and local filter")
        self.dims, start = list(conv.dims), conv.dims[0]
        middle = start + sum(conv.dims) // 2
        self.first = select_outputs(conv.proj_in, slice(0, start))
        self.local = select_outputs(conv.proj_in, slice(start, middle))
        self.spread = select_outputs(conv.proj_in, slice(middle, None))
        self.norm = HalvesNorm(mixer.pre_norm)
        self.mixer = mixer
        mixer.pre_norm = nn.Identity()
        self.pws, self.proj_out = conv.pws, conv.proj_out

    def forward(self, x: Tensor) -> Tensor:
        gates = self.mixer.mix(*self.norm(self.local(x), self.spread(x))).split(self.dims, dim=1)
        y = self.first(x) * gates[0]
        for project, gate in zip(self.pws, gates[1:]):
            y = project(y) * gate
        return self.proj_out(y)


class HalvesNorm(nn.Module):
    """A layer norm over the channels of two maps (B, C, H, W), one after the other."""

    def __init__(self, norm: LayerNorm2d) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weights, self.biases = (
            nn.ParameterList(half.view(1, -1, 1, 1) for half in values.detach().chunk(2))
            for values in (norm.weight, norm.bias)
        )

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        mean = (first.mean(1, keepdim=True) + second.mean(1, keepdim=True)) / 2
        maps = [first - mean, second - mean]
        squares = [x.to(statistics_dtype(x)).square().mean(1, keepdim=True) for x in maps]
        scale = ((squares[0] + squares[1]) / 2 + self.eps).rsqrt().to(first.dtype)
        return [x * scale * w + b for x, w, b in zip(maps, self.weights, self.biases)]
