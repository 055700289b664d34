"""Squeeze and excitation of channels in another order, or of two maps at once."""

from __future__ import annotations

import copy

import torch
from timm.layers import SqueezeExcite
from torch import Tensor, nn

from backbones.lowering.parts import inputs_of, outputs_of, with_values

__all__ = ["in_order", "side_by_side"]


def in_order(se: SqueezeExcite, order: Tensor) -> SqueezeExcite:
    """Return a squeeze and excitation of the channels in another order."""
    twin = copy.deepcopy(se)
    twin.fc1 = inputs_of(se.fc1, order)
    twin.fc2 = outputs_of(se.fc2, order)
    return twin


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
