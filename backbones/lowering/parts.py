"""Convolutions with the channels of their inputs or outputs in other orders and portions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["SeparateGates", "depthwise", "inputs_of", "outputs_of"]


def outputs_of(conv: nn.Conv2d, channels: slice | Tensor) -> nn.Conv2d:
    """Return the convolution that computes some of the output channels.

    Args:
        conv: dense, or depthwise with as many outputs as inputs, of which it takes those channels.
        channels: which, in which order.
    """
    return _conv(conv, conv.weight[channels], None if conv.bias is None else conv.bias[channels])


def inputs_of(conv: nn.Conv2d, order: Tensor) -> nn.Conv2d:
    """Return a dense convolution that takes its input channels in another order."""
    return _conv(conv, conv.weight[:, order], conv.bias)


def depthwise(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """Return a depthwise convolution with the geometry of `conv` and kernels (C, 1, k, k)."""
    return _conv(conv, weight, bias, groups=len(weight))


def _conv(
    like: nn.Conv2d, weight: Tensor, bias: Tensor | None, groups: int | None = None
) -> nn.Conv2d:
    if groups is None:
        groups = 1 if like.groups == 1 else len(weight)
    conv = nn.Conv2d(
        weight.shape[1] * groups,
        len(weight),
        like.kernel_size,  # type: ignore[arg-type]
        like.stride,  # type: ignore[arg-type]
        like.padding,  # type: ignore[arg-type]
        like.dilation,  # type: ignore[arg-type]
        groups,
        bias is not None,
        device="meta",
    )
    conv.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone())
    return conv.train(like.training)


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
