"""SpaRTAN's mixers without operations on pairs of channels, and with fewer products.

In channel mixers the even channels come first here, then the odd ones: as the halves of one map
(`PairMixer`) or as two maps (`RotatedMixer`).
"""

import copy

import torch
from timm.layers import SqueezeExcite
from torch import Tensor, nn

from backbones.engines.rewrites.contrast import ContrastedProjection
from backbones.engines.rewrites.convolutions import (
    depthwise,
    select_inputs,
    select_outputs,
    with_values,
)
from backbones.families.spartan import ChannelMixer, SpatialMixer

__all__ = ["JoinedMixer", "PairMixer", "RotatedMixer", "separate_pairs", "side_by_side"]


class JoinedMixer(nn.Module):
    """A re-parameterized spatial mixer with one squeeze and excitation for both branches.

    It takes over the parts of `mixer`.
    """

    def __init__(self, mixer: SpatialMixer) -> None:
        super().__init__()
        self.proj_in = ContrastedProjection(mixer.proj_in, mixer.contrast)
        self.conv_h, self.conv_l = mixer.conv_h, mixer.conv_l
        self.se = side_by_side(mixer.se_h, mixer.se_l)
        self.proj_out = mixer.proj_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj_in(x)
        return self.proj_out(self.se(torch.cat((self.conv_h(y), self.conv_l(y)), dim=1)))


def side_by_side(first: SqueezeExcite, second: SqueezeExcite) -> SqueezeExcite:
    """Return the one that does to two maps, one after the other in the channels, what two do."""
    twin = copy.deepcopy(first)
    twin.fc1 = _block_diagonal(first.fc1, second.fc1)
    twin.fc2 = _block_diagonal(first.fc2, second.fc2)
    return twin


def _block_diagonal(first: nn.Conv2d, second: nn.Conv2d) -> nn.Conv2d:
    """Return the dense 1x1 convolution that applies one to each part of the channels."""
    weight = torch.block_diag(first.weight.flatten(1), second.weight.flatten(1))
    bias = torch.cat((_bias_of(first), _bias_of(second)))
    return with_values(first, weight[..., None, None], bias)


def _bias_of(conv: nn.Conv2d) -> Tensor:
    """Return a convolution's bias, zeros where it has none."""
    return conv.weight.new_zeros(len(conv.weight)) if conv.bias is None else conv.bias


def separate_pairs(mixer: ChannelMixer, decompose: bool) -> nn.Module:
    """Return a mixer without operations on pairs; itself where it takes no pairs to pairs."""
    conv = mixer.conv.conv
    if not conv.in_channels == conv.out_channels == 2 * conv.groups:
        return mixer
    if decompose and RotatedMixer.fits(conv):
        return RotatedMixer(mixer)
    return PairMixer(mixer, decompose)


class PairMixer(nn.Module):
    """A mixer whose convolution takes the channels (2k, 2k + 1) to the same two.

    Two depthwise convolutions compute what the one over pairs does,
    ``depthwise(x) + depthwise(x with its halves swapped)``, and engines have fast kernels for
    these. Value and gate are not one map that is split. `mixer` is re-parameterized and used up;
    with `decompose` the strongest channel's feature is picked without argmax and gather.
    """

    original: Tensor
    indices: Tensor
    places: Tensor

    def __init__(self, mixer: ChannelMixer, decompose: bool) -> None:
        super().__init__()
        proj, conv = mixer.proj, mixer.conv.conv
        hidden, dim = conv.in_channels, proj.in_channels
        even, odd = torch.arange(0, hidden, 2), torch.arange(1, hidden, 2)
        order = torch.cat((even, odd))
        self.pairs, self.decompose = hidden // 2, decompose
        self.value = select_outputs(proj, order)
        self.gate = select_outputs(proj, hidden + order)
        self.act = mixer.act
        weight = conv.weight
        straight = torch.cat((weight[even, :1], weight[odd, 1:]))
        crossed = torch.cat((weight[even, 1:], weight[odd, :1]))
        self.conv = depthwise(conv, straight, None if conv.bias is None else conv.bias[order])
        self.conv_crossed = depthwise(conv, crossed, None)
        self.conv_act = mixer.conv.get_submodule("act")
        self.se = _in_order(mixer.se, order)
        self.proj_out = select_inputs(mixer.proj_out, order)
        self.register_buffer("indices", _channel_numbers(torch.arange(dim), dim), persistent=False)
        self.register_buffer("places", order.argsort()[:dim], persistent=False)
        original = _channel_numbers(torch.where(order < dim, order, -1), dim)
        self.register_buffer("original", original, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        token = self.value(x) * self.act(self.gate(x))
        token = token + (self.picked if self.decompose else self.gathered)(token, x)
        swapped = torch.cat((token[:, self.pairs :], token[:, : self.pairs]), dim=1)
        y = self.conv_act(self.conv(token) + self.conv_crossed(swapped))
        return self.proj_out(self.se(y))

    def gathered(self, token: Tensor, x: Tensor) -> Tensor:
        """Return the feature of each position's strongest channel in x, (B, 1, H, W)."""
        # In their own order: not all engines can find the place of a number in another.
        own = token.index_select(1, self.places)
        return own.gather(1, x.argmax(dim=1, keepdim=True))

    def picked(self, token: Tensor, x: Tensor) -> Tensor:
        """Return the same without argmax and gather."""
        first = _first_strongest(x, self.indices)
        return torch.where(self.original == first, token, 0).sum(dim=1, keepdim=True)


class RotatedMixer(nn.Module):
    """A mixer whose convolution over pairs is a rotation and a depthwise one.

    Nothing is split or joined, and the rotation is arithmetic on whole maps, which engines do in
    one pass. `mixer` is re-parameterized, with a convolution that `fits`; it is used up.
    """

    def __init__(self, mixer: ChannelMixer) -> None:
        super().__init__()
        hidden, dim = mixer.conv.conv.in_channels, mixer.proj.in_channels
        self.strongest = _StrongestFeature(
            select_outputs(mixer.proj, torch.arange(dim)),
            select_outputs(mixer.proj, hidden + torch.arange(dim)),
            mixer.act,
        )
        self.even, self.odd = (_Half(torch.arange(first, hidden, 2), mixer) for first in (0, 1))
        self.act, self.conv_act = mixer.act, mixer.conv.get_submodule("act")
        self.se_act, self.se_gate = mixer.se.act, mixer.se.gate

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Tell whether a convolution over pairs is a rotation and a depthwise one.

        Its kernels, one for each of the two inputs, are then multiples of each other.
        """
        values = torch.linalg.svdvals(conv.weight.detach().flatten(2))
        return bool((values[:, 1] <= 32 * torch.finfo(values.dtype).eps * values[:, 0]).all())

    def forward(self, x: Tensor) -> Tensor:
        both = (self.even, self.odd)
        feature = self.strongest(x)
        even, odd = (half.value(x) * self.act(half.gate(x)) + feature for half in both)
        maps = [self.conv_act(half.conv(half.rotated(even, odd))) for half in both]
        inner = self.se_act(self.even.squeezed(maps[0]) + self.odd.squeezed(maps[1]))
        first, second = (
            half.proj_out(y * self.se_gate(half.se_out(inner))) for half, y in zip(both, maps)
        )
        return first + second


class _Half(nn.Module):
    """The parts that belong to the even or to the odd channels.

    The first half holds the biases of what both add up to.
    """

    from_even: Tensor
    from_odd: Tensor

    def __init__(self, order: Tensor, mixer: ChannelMixer) -> None:
        super().__init__()
        conv, se = mixer.conv.conv, mixer.se
        self.value = select_outputs(mixer.proj, order)
        self.gate = select_outputs(mixer.proj, conv.in_channels + order)
        # A kernel (2, k, k) of rank one: what an output takes of the even and odd channel, and
        # the depthwise kernel for that.
        kernels = conv.weight.detach()[order]
        left, values, right = torch.linalg.svd(kernels.flatten(2), full_matrices=False)
        kernel = (values[:, :1] * right[:, 0]).view(-1, 1, *kernels.shape[2:])
        bias = None if conv.bias is None else conv.bias[order]
        self.conv = depthwise(conv, kernel, bias)
        for place, name in enumerate(("from_even", "from_odd")):
            self.register_buffer(name, left[:, place, 0].view(1, -1, 1, 1).clone())
        self.se_in, self.se_out = select_inputs(se.fc1, order), select_outputs(se.fc2, order)
        self.proj_out = select_inputs(mixer.proj_out, order)
        if order[0] != 0:
            self.se_in.bias = self.proj_out.bias = None

    def rotated(self, even: Tensor, odd: Tensor) -> Tensor:
        """Return this half of the rotated channels."""
        return even * self.from_even + odd * self.from_odd

    def squeezed(self, y: Tensor) -> Tensor:
        """Return this half's share in the inner layer of squeeze and excitation."""
        return self.se_in(y.mean((2, 3), keepdim=True))


class _StrongestFeature(nn.Module):
    """``(value(x) * act(gate(x)))[strongest channel of x]``, a map (B, 1, H, W).

    Ties go to the first channel.
    """

    numbers: Tensor

    def __init__(self, value: nn.Conv2d, gate: nn.Conv2d, act: nn.Module) -> None:
        super().__init__()
        self.value, self.gate, self.act = value, gate, act
        count = value.in_channels
        self.register_buffer("numbers", _channel_numbers(torch.arange(count), count))

    def forward(self, x: Tensor) -> Tensor:
        first = _first_strongest(x, self.numbers)
        feature = self.value(x) * self.act(self.gate(x))
        return torch.where(self.numbers == first, feature, 0).sum(dim=1, keepdim=True)


def _channel_numbers(channels: Tensor, count: int) -> Tensor:
    """Return numbers of channels, below `count`, as (1, n, 1, 1) in the cheapest exact type.

    Those above 256 need integers, which are slower: bfloat16 cannot tell 257 from 256.
    """
    return channels.to(torch.float32 if count <= 256 else torch.int32).view(1, -1, 1, 1)


def _first_strongest(x: Tensor, numbers: Tensor) -> Tensor:
    """Return the number of each position's strongest channel, the first of equals, (B, 1, H, W)."""
    is_strongest = x == x.amax(dim=1, keepdim=True)
    return torch.where(is_strongest, numbers, x.shape[1]).amin(dim=1, keepdim=True)


def _in_order(se: SqueezeExcite, order: Tensor) -> SqueezeExcite:
    """Return a squeeze and excitation of the channels in another order."""
    twin = copy.deepcopy(se)
    twin.fc1 = select_inputs(se.fc1, order)
    twin.fc2 = select_outputs(se.fc2, order)
    return twin
