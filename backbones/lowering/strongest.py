"""The feature of each position's strongest channel, without argmax and gather."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["StrongestFeature", "channel_numbers", "first_strongest"]


def channel_numbers(channels: Tensor, count: int) -> Tensor:
    """Return numbers of channels, below `count`, as (1, n, 1, 1) in the cheapest exact type.

    Those above 256 need integers, which are slower: bfloat16 cannot tell 257 from 256.
    """
    return channels.to(torch.float32 if count <= 256 else torch.int32).view(1, -1, 1, 1)


def first_strongest(x: Tensor, numbers: Tensor) -> Tensor:
    """Return the number of each position's strongest channel, the first of equals, (B, 1, H, W)."""
    is_strongest = x == x.amax(dim=1, keepdim=True)
    return torch.where(is_strongest, numbers, x.shape[1]).amin(dim=1, keepdim=True)


class StrongestFeature(nn.Module):
    """``(value(x) * act(gate(x)))[strongest channel of x]``, a map (B, 1, H, W).

    Ties go to the first channel.
    """

    numbers: Tensor

    def __init__(self, value: nn.Conv2d, gate: nn.Conv2d, act: nn.Module) -> None:
        super().__init__()
        self.value, self.gate, self.act = value, gate, act
        count = value.in_channels
        self.register_buffer("numbers", channel_numbers(torch.arange(count), count))

    def forward(self, x: Tensor) -> Tensor:
        first = first_strongest(x, self.numbers)
        feature = self.value(x) * self.act(self.gate(x))
        return torch.where(self.numbers == first, feature, 0).sum(dim=1, keepdim=True)
