"""HorNet's gated convolution with the global and local filter, with fewer splits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from backbones.layers import statistics_dtype
from backbones.lowering.parts import outputs_of

__all__ = ["FilteredGates", "HalvesNorm"]


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


class FilteredGates(nn.Module):
    """The merged convolution with a projection each for first factor, local and global channels.

    Args:
        proj_in: gives the first factor and all gates; dense.
        mixer: the filter, a `backbones.families.hornet.GlobalLocalFilter`.
        dims: channels of the gates; the first factor has as many as the first gate.
        pws: projections from each gate to the next.
        proj_out: the last projection.
    """

    def __init__(
        self,
        proj_in: nn.Conv2d,
        mixer: Any,
        dims: Sequence[int],
        pws: nn.ModuleList,
        proj_out: nn.Module,
    ) -> None:
        super().__init__()
        self.dims, start = list(dims), dims[0]
        middle = start + sum(dims) // 2
        self.first = outputs_of(proj_in, slice(0, start))
        self.local = outputs_of(proj_in, slice(start, middle))
        self.spread = outputs_of(proj_in, slice(middle, None))
        self.norm = HalvesNorm(mixer.pre_norm)
        self.mixer = mixer
        mixer.pre_norm = nn.Identity()
        self.pws, self.proj_out = pws, proj_out

    def forward(self, x: Tensor) -> Tensor:
        gates = self.mixer.mix(*self.norm(self.local(x), self.spread(x))).split(self.dims, dim=1)
        y = self.first(x) * gates[0]
        for project, gate in zip(self.pws, gates[1:]):
            y = project(y) * gate
        return self.proj_out(y)
