"""Biases of keys and values leave a softmax attention."""

from __future__ import annotations

import pytest
import torch
from merge_layers import (
    BIAS,
    PADDED,
    assert_same,
    assert_unchanged,
    linear_layer,
    randomized,
    snapshot,
    value,
)
from merge_scenes import INTERLEAVED, THIRDS, Attention, assert_exact, attention
from torch import nn

from backbones import merge


@BIAS
@pytest.mark.parametrize("rows", [THIRDS, INTERLEAVED], ids=["slices", "masks"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_biases_of_keys_and_values_leave_a_softmax_attention(kind, rows, bias):
    scene = assert_exact(attention(kind, rows, bias))
    left, (q, k, v) = scene.qkv.bias.detach(), rows
    assert left[q].abs().max() > 0
    assert not left[k].any() and not left[v].any()


@pytest.mark.parametrize("rows", [THIRDS, INTERLEAVED], ids=["slices", "masks"])
@pytest.mark.parametrize("part", ["fold_keys", "fold_values"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_each_bias_of_an_attention_moves_alone(kind, part, rows):
    scene = randomized(attention(kind, rows))
    x = torch.randn(scene.shape, dtype=torch.float64)
    expected, before = value(scene, x), snapshot(scene)
    getattr(scene, part)()
    assert_same(value(scene, x), expected)
    changed = {
        name for name, tensor in scene.state_dict().items() if (tensor != before[name]).any()
    }
    assert changed == {"qkv.bias"} | ({"after.bias"} if part == "fold_values" else set())


def test_biases_of_an_attention_that_are_zero_or_missing_are_left():
    scene = randomized(attention("linear", bias=False))
    scene.qkv.bias.data[8:] = 0
    bare = Attention(nn.Linear(8, 24, bias=False), nn.Linear(8, 6, bias=False), THIRDS)
    for each in (scene, bare):
        before = snapshot(each)
        with merge.recorded() as counts:
            each.fold()
        assert not counts
        assert_unchanged(each, before)


@pytest.mark.parametrize("kind", PADDED)
def test_the_bias_of_values_stays_before_a_padded_convolution(kind):
    scene = randomized(Attention(nn.Conv2d(8, 24, 1), linear_layer(kind), THIRDS))
    before = snapshot(scene)
    with merge.recorded() as counts:
        scene.fold_values()
    assert not counts
    assert_unchanged(scene, before)
