"""Convolutions with the channels of their inputs or outputs in other orders and portions."""

import copy

from torch import Tensor, nn

__all__ = ["depthwise", "select_inputs", "select_outputs", "with_values"]


def select_outputs(conv: nn.Conv2d, channels: slice | Tensor) -> nn.Conv2d:
    """Return the convolution that computes some output channels, in this order.

    `conv` is dense, or depthwise with as many outputs as inputs, of which it takes those channels.
    """
    weight = conv.weight[channels]
    bias = None if conv.bias is None else conv.bias[channels]
    return with_values(conv, weight, bias, 1 if conv.groups == 1 else len(weight))


def select_inputs(conv: nn.Conv2d, order: Tensor) -> nn.Conv2d:
    """Return a dense convolution that takes its input channels in another order."""
    return with_values(conv, conv.weight[:, order], conv.bias)


def depthwise(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """Return a depthwise convolution with the geometry of `conv` and kernels (C, 1, k, k)."""
    return with_values(conv, weight, bias, len(weight))


def with_values(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, groups: int = 1) -> nn.Conv2d:
    """Return a convolution with the geometry of `conv` and copies of these values."""
    fresh = copy.deepcopy(conv)
    fresh.in_channels, fresh.out_channels = weight.shape[1] * groups, len(weight)
    fresh.groups = groups
    fresh.weight = nn.Parameter(weight.detach().clone())
    fresh.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return fresh
