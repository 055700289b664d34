"""SpaRTAN's early channel mixers: pairs of channels are rotated, then mixed depthwise."""

from __future__ import annotations

import torch
from timm.layers import SqueezeExcite
from torch import Tensor, nn

from backbones.lowering.parts import depthwise, inputs_of, outputs_of
from backbones.lowering.strongest import StrongestFeature

__all__ = ["RotatedMixer"]


class RotatedMixer(nn.Module):
    """A merged channel mixer whose convolution over pairs is a rotation and a depthwise one.

    The even channels are one map here and the odd ones another, so that nothing is split or joined,
    and the rotation is arithmetic on whole maps, which engines do in one pass.

    Args:
        proj: gives value and gate, one after the other.
        act: of the gate.
        conv: takes pairs to pairs; it must fit (see `fits`).
        conv_act: after it.
        se: squeeze and excitation after that.
        proj_out: the last projection.
    """

    def __init__(
        self,
        proj: nn.Conv2d,
        act: nn.Module,
        conv: nn.Conv2d,
        conv_act: nn.Module,
        se: SqueezeExcite,
        proj_out: nn.Conv2d,
    ) -> None:
        super().__init__()
        hidden, dim = conv.in_channels, proj.in_channels
        self.strongest = StrongestFeature(
            outputs_of(proj, torch.arange(dim)), outputs_of(proj, hidden + torch.arange(dim)), act
        )
        self.even, self.odd = (
            _Half(torch.arange(first, hidden, 2), proj, conv, se, proj_out) for first in (0, 1)
        )
        self.act, self.conv_act = act, conv_act
        self.se_act, self.se_gate = se.act, se.gate

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

    def __init__(
        self, order: Tensor, proj: nn.Conv2d, conv: nn.Conv2d, se: SqueezeExcite, out: nn.Conv2d
    ) -> None:
        super().__init__()
        self.value = outputs_of(proj, order)
        self.gate = outputs_of(proj, conv.in_channels + order)
        # A kernel (2, k, k) of rank one: what an output takes of the even and odd channel, and
        # the depthwise kernel for that.
        kernels = conv.weight.detach()[order]
        left, values, right = torch.linalg.svd(kernels.flatten(2), full_matrices=False)
        kernel = (values[:, :1] * right[:, 0]).view(-1, 1, *kernels.shape[2:])
        bias = None if conv.bias is None else conv.bias[order]
        self.conv = depthwise(conv, kernel, bias)
        for place, name in enumerate(("from_even", "from_odd")):
            self.register_buffer(name, left[:, place, 0].view(1, -1, 1, 1).clone())
        self.se_in, self.se_out = inputs_of(se.fc1, order), outputs_of(se.fc2, order)
        self.proj_out = inputs_of(out, order)
        if order[0] != 0:
            self.se_in.bias = self.proj_out.bias = None

    def rotated(self, even: Tensor, odd: Tensor) -> Tensor:
        """Return this half of the rotated channels."""
        return even * self.from_even + odd * self.from_odd

    def squeezed(self, y: Tensor) -> Tensor:
        """Return this half's share in the inner layer of squeeze and excitation."""
        return self.se_in(y.mean((2, 3), keepdim=True))
