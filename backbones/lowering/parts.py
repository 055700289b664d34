"""Convolutions with the channels of their inputs or outputs in other orders and portions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from backbones import merge

__all__ = ["SeparateGates", "depthwise", "inputs_of", "outputs_of", "with_values"]


def outputs_of(conv: nn.Conv2d, channels: slice | Tensor) -> nn.Conv2d:
    """Return the convolution that computes some of the output channels.

    Args:
        conv: dense, or depthwise with as many outputs as inputs, of which it takes those channels.
        channels: which, in which order.
    """
    weight = conv.weight[channels]
    bias = None if conv.bias is None else conv.bias[channels]
    return with_values(conv, weight, bias, 1 if conv.groups == 1 else len(weight))


def inputs_of(conv: nn.Conv2d, order: Tensor) -> nn.Conv2d:
    """Return a dense convolution that takes its input channels in another order."""
    return with_values(conv, conv.weight[:, order], conv.bias)


def depthwise(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """Return a depthwise convolution with the geometry of `conv` and kernels (C, 1, k, k)."""
    return with_values(conv, weight, bias, len(weight))


@torch.no_grad()
def with_values(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, groups: int = 1) -> nn.Conv2d:
    """Return a convolution with the geometry of `conv` and copies of these values."""
    channels = weight.shape[1] * groups, len(weight)
    fresh = merge.like(conv, *channels, groups, bias=bias is not None)
    fresh.weight.copy_(weight)
    if fresh.bias is not None and bias is not None:
        fresh.bias.copy_(bias)
    return fresh


class SeparateGates(nn.Module):
    """HorNet's gated convolution without splits: a projection and mixer for each gate.

    Args:
        proj_in: gives the first factor and all gates; dense.
        mixer: mixes all gates; depthwise.
        dims: channels of the gates; the first factor has as many as the first gate.
        pws: projections from each gate to the next.
        proj_out: the last projection.
    """

    def __init__(
        self,
        proj_in: nn.Conv2d,
        mixer: nn.Conv2d,
        dims: Sequence[int],
        pws: nn.ModuleList,
        proj_out: nn.Module,
    ) -> None:
        super().__init__()
        self.first = outputs_of(proj_in, slice(0, dims[0]))
        rest = outputs_of(proj_in, slice(dims[0], None))
        ends = list(itertools.accumulate(dims))
        parts = [slice(end - dim, end) for dim, end in zip(dims, ends)]
        self.gates = nn.ModuleList(
            nn.Sequential(outputs_of(rest, part), outputs_of(mixer, part)) for part in parts
        )
        self.pws, self.proj_out = pws, proj_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * self.gates[0](x)
        for project, gate in zip(self.pws, self.gates[1:]):
            y = project(y) * gate(x)
        return self.proj_out(y)
