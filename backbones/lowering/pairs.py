"""SpaRTAN's channel mixer without operations on pairs of channels."""

from __future__ import annotations

import copy

import torch
from timm.layers import SqueezeExcite
from torch import Tensor, nn

from backbones.families import spartan
from backbones.lowering.parts import depthwise, inputs_of, outputs_of

__all__ = ["PairMixer", "elementary_pairs"]


class PairMixer(nn.Module):
    """A merged channel mixer whose convolution takes the channels (2k, 2k + 1) to the same two.

    The even channels come first here, then the odd ones, so that two depthwise convolutions
    compute what the one over pairs does, ``depthwise(x) + depthwise(x with its halves swapped)``,
    and engines have fast kernels for these. Value and gate are not one map that is split.
    """

    original: Tensor
    indices: Tensor

    def __init__(self, mixer: spartan.ChannelMixer, conv: nn.Conv2d, elementary: bool) -> None:
        super().__init__()
        hidden, dim = conv.in_channels, mixer.proj.in_channels
        even, odd = torch.arange(0, hidden, 2), torch.arange(1, hidden, 2)
        order = torch.cat((even, odd))
        self.pairs, self.dim, self.elementary = hidden // 2, dim, elementary
        self.value = outputs_of(mixer.proj, order)
        self.gate = outputs_of(mixer.proj, hidden + order)
        self.act = mixer.act
        weight = conv.weight
        straight = torch.cat((weight[even, :1], weight[odd, 1:]))
        crossed = torch.cat((weight[even, 1:], weight[odd, :1]))
        bias = None if conv.bias is None else conv.bias[order]
        self.conv = depthwise(conv, straight, bias)
        self.conv_crossed = depthwise(conv, crossed, None)
        self.conv_act = mixer.conv.get_submodule("act")
        self.se = in_order(mixer.se, order)
        self.proj_out = inputs_of(mixer.proj_out, order)
        # Numbers above 256 need integers, which are slower: bfloat16 cannot tell 257 from 256.
        kind = torch.float32 if dim <= 256 else torch.int32
        indices = torch.arange(dim, dtype=kind).view(1, -1, 1, 1)
        self.register_buffer("indices", indices, persistent=False)
        original = torch.where(order < dim, order, -1).to(kind).view(1, -1, 1, 1)
        self.register_buffer("original", original, persistent=False)

    @classmethod
    def of(cls, mixer: spartan.ChannelMixer, elementary: bool = False) -> PairMixer | None:
        """Return the form of a merged mixer; None where its convolution has other groups."""
        conv = mixer.conv.get_submodule("conv")
        assert isinstance(conv, nn.Conv2d)
        if 2 * conv.groups != conv.in_channels or conv.in_channels != conv.out_channels:
            return None
        if mixer.rotation is not None or not isinstance(mixer.theta, nn.Identity):
            return None
        return cls(mixer, conv, elementary)

    def forward(self, x: Tensor) -> Tensor:
        token = self.value(x) * self.act(self.gate(x))
        token = token + (self.picked if self.elementary else self.gathered)(token, x)
        swapped = torch.cat((token[:, self.pairs :], token[:, : self.pairs]), dim=1)
        y = self.conv_act(self.conv(token) + self.conv_crossed(swapped))
        return self.proj_out(self.se(y))

    def gathered(self, token: Tensor, x: Tensor) -> Tensor:
        """Return the feature of each position's strongest channel in x, (B, 1, H, W)."""
        strongest = x.argmax(dim=1, keepdim=True)
        return token.gather(1, strongest // 2 + strongest % 2 * self.pairs)

    def picked(self, token: Tensor, x: Tensor) -> Tensor:
        """Return the same without argmax and gather."""
        is_strongest = x == x.amax(dim=1, keepdim=True)
        first = torch.where(is_strongest, self.indices, self.dim).amin(dim=1, keepdim=True)
        return torch.where(self.original == first, token, 0).sum(dim=1, keepdim=True)


def elementary_pairs(mixer: spartan.ChannelMixer) -> PairMixer | None:
    """Return the form that picks the strongest channel's feature in elementary operations."""
    return PairMixer.of(mixer, elementary=True)


def in_order(se: SqueezeExcite, order: Tensor) -> SqueezeExcite:
    """Return a squeeze and excitation of the channels in another order."""
    twin = copy.deepcopy(se)
    twin.fc1 = inputs_of(se.fc1, order)
    twin.fc2 = outputs_of(se.fc2, order)
    return twin
