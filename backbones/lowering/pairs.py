"""SpaRTAN's channel mixer without operations on pairs of channels."""

from __future__ import annotations

import torch
from timm.layers import SqueezeExcite
from torch import Tensor, nn

from backbones.lowering.parts import depthwise, inputs_of, outputs_of
from backbones.lowering.squeeze import in_order
from backbones.lowering.strongest import channel_numbers, first_strongest

__all__ = ["PairMixer"]


class PairMixer(nn.Module):
    """A merged channel mixer whose convolution takes the channels (2k, 2k + 1) to the same two.

    The even channels come first here, then the odd ones, so that two depthwise convolutions
    compute what the one over pairs does, ``depthwise(x) + depthwise(x with its halves swapped)``,
    and engines have fast kernels for these. Value and gate are not one map that is split.

    Args:
        proj: gives value and gate, one after the other.
        act: of the gate.
        conv: takes pairs to pairs.
        conv_act: after it.
        se: squeeze and excitation after that.
        proj_out: the last projection.
        elementary: pick the strongest channel's feature without argmax and gather.
    """

    original: Tensor
    indices: Tensor

    def __init__(
        self,
        proj: nn.Conv2d,
        act: nn.Module,
        conv: nn.Conv2d,
        conv_act: nn.Module,
        se: SqueezeExcite,
        proj_out: nn.Conv2d,
        *,
        elementary: bool = False,
    ) -> None:
        super().__init__()
        hidden, dim = conv.in_channels, proj.in_channels
        even, odd = torch.arange(0, hidden, 2), torch.arange(1, hidden, 2)
        order = torch.cat((even, odd))
        self.pairs, self.elementary = hidden // 2, elementary
        self.value = outputs_of(proj, order)
        self.gate = outputs_of(proj, hidden + order)
        self.act = act
        weight = conv.weight
        straight = torch.cat((weight[even, :1], weight[odd, 1:]))
        crossed = torch.cat((weight[even, 1:], weight[odd, :1]))
        self.conv = depthwise(conv, straight, None if conv.bias is None else conv.bias[order])
        self.conv_crossed = depthwise(conv, crossed, None)
        self.conv_act = conv_act
        self.se = in_order(se, order)
        self.proj_out = inputs_of(proj_out, order)
        self.register_buffer("indices", channel_numbers(torch.arange(dim), dim), persistent=False)
        original = channel_numbers(torch.where(order < dim, order, -1), dim)
        self.register_buffer("original", original, persistent=False)

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Tell whether a convolution takes pairs of channels to pairs."""
        return conv.in_channels == conv.out_channels == 2 * conv.groups

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
        first = first_strongest(x, self.indices)
        return torch.where(self.original == first, token, 0).sum(dim=1, keepdim=True)
