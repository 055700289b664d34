"""Contrast with the mean, layers side by side, their mean, and rotations of channels."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from merge_layers import BIAS, GEOMETRIES, linear_layer, randomized
from merge_scenes import Averaged, Contrast, Rotated, SideBySide, assert_exact

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@BIAS
@pytest.mark.parametrize("groups", [1, 2])
def test_contrast_with_the_mean_becomes_two_convolutions(groups, bias):
    scene = assert_exact(Contrast(bias, groups))
    assert (scene.conv.bias is not None) == bias and scene.mean.bias is None


@pytest.mark.parametrize("kind", [k for k, o in GEOMETRIES.items() if "groups" not in o])
def test_convolutions_of_one_input_become_one(kind):
    for bias, other_bias in product([True, False], repeat=2):
        first, second = linear_layer(kind, bias), linear_layer(kind, other_bias, out_channels=3)
        both = assert_exact(SideBySide(first, second)).first
        for name in ("kernel_size", "stride", "padding", "dilation", "groups", "in_channels"):
            assert getattr(both, name) == getattr(first, name), name
        assert both.out_channels == 9


@pytest.mark.parametrize(("bias", "other_bias"), product([True, False], repeat=2))
def test_the_mean_of_two_linear_layers_is_one(bias, other_bias):
    assert_exact(Averaged(bias, other_bias))


# (kind, outputs, groups after)
ROTATED = [
    ("1x1", 6, 1),
    ("even_strided", 6, 1),
    ("same", 6, 1),
    ("padded_grouped", 4, 2),
    ("same_even", 12, 4),
    ("depthwise", 8, 4),
    ("valid_dilated", 6, 2),
    ("padded_depthwise", 8, 4),
]


@BIAS
@pytest.mark.parametrize(("kind", "outputs", "groups"), ROTATED)
def test_a_complex_rotation_goes_into_the_convolution_after(kind, outputs, groups, bias):
    old = linear_layer(kind, bias, out_channels=outputs)
    conv = assert_exact(Rotated(old)).conv
    assert conv.groups == groups and (conv.bias is not None) == bias
    for name in ("kernel_size", "stride", "padding", "dilation", "in_channels", "out_channels"):
        assert getattr(conv, name) == getattr(old, name), name


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_a_rotation_goes_into_channels_last_weights(groups):
    scene = randomized(Rotated(linear_layer("padded", out_channels=8, groups=groups)))
    assert_exact(scene.to(memory_format=torch.channels_last))
