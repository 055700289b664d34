"""Convolutions with the channels of their inputs or outputs in other orders and portions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from backbones.families import hornet

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
    """A merged gated convolution (HorNet) whose projection is not split: each part has its own.

    Args:
        first: gives the first factor.
        gates: give each gate, mixer included.
        pws: projections from each gate to the next.
        proj_out: the last projection.
    """

    def __init__(
        self,
        first: nn.Module,
        gates: Sequence[nn.Module],
        pws: nn.ModuleList,
        proj_out: nn.Module,
    ) -> None:
        super().__init__()
        self.first, self.gates = first, nn.ModuleList(gates)
        self.pws, self.proj_out = pws, proj_out

    @classmethod
    def of(cls, block: hornet.GatedConv) -> SeparateGates | None:
        """Return the form of a gated convolution; None where its mixer takes all gates at once."""
        if not isinstance(block.mixer, nn.Conv2d) or block.scale != 1:
            return None
        start = block.dims[0]
        first = outputs_of(block.proj_in, slice(0, start))
        rest = outputs_of(block.proj_in, slice(start, None))
        gates, place = [], 0
        for dim in block.dims:
            part = slice(place, place + dim)
            gates.append(nn.Sequential(outputs_of(rest, part), outputs_of(block.mixer, part)))
            place += dim
        return cls(first, gates, block.pws, block.proj_out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * self.gates[0](x)
        for project, gate in zip(self.pws, self.gates[1:]):
            y = project(y) * gate(x)
        return self.proj_out(y)
