"""What a linear layer is, and that nothing moves into anything else."""

from __future__ import annotations

import pytest
import torch
from merge_layers import EVERY_LAYER, assert_unchanged, linear_layer, randomized, snapshot
from timm.layers import Conv2dSame
from torch import nn

from backbones import merge


class OwnConv(nn.Conv2d):
    pass


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize("kind", EVERY_LAYER)
def test_plain_convolutions_and_nn_linear_are_linear_layers(kind):
    assert merge.is_linear_layer(linear_layer(kind))


NO_LINEAR_LAYERS = {
    "own_conv": lambda: OwnConv(8, 8, 1),
    "own_linear": lambda: OwnLinear(8, 8),
    "timm_same": lambda: Conv2dSame(8, 8, 3, stride=2),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 1),
    "conv1d": lambda: nn.Conv1d(8, 8, 1),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
    "sequential": lambda: nn.Sequential(nn.Conv2d(8, 8, 1)),
    "none": lambda: None,
}


@pytest.mark.parametrize("name", NO_LINEAR_LAYERS)
def test_nothing_moves_into_what_is_no_plain_linear_layer(name):
    other = NO_LINEAR_LAYERS[name]()
    norm = randomized(nn.BatchNorm2d(8))
    both = nn.ModuleList([norm, *([] if other is None else [other])])
    before = snapshot(both)
    assert not merge.is_linear_layer(other)
    with merge.recorded() as counts:
        assert merge.norm_into_previous(other, norm) is norm
        assert merge.norm_into_next(norm, other) is norm
        merge.uniform_bias_into_next(nn.Linear(8, 8), slice(None), other)
        with pytest.raises(ValueError, match="it is no unpadded linear layer"):
            merge.shift_into_next(torch.ones(8), other)
    assert not counts
    assert_unchanged(both, before)
