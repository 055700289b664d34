"""Initial values that families share."""

import math

from torch import nn

__all__ = ["init_by_fan_out"]


def init_by_fan_out(conv: nn.Conv2d) -> None:
    """Draw the weight from a normal of variance 2 / (outputs of a group * taps); zero the bias."""
    fan_out = conv.out_channels // conv.groups * math.prod(conv.kernel_size)
    nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
