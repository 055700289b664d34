"""Factors and offsets per channel, and constant factors."""

from __future__ import annotations

import pytest
import torch
from merge_layers import (
    BIAS,
    EVERY_UNPADDED,
    FEATURE_MAP,
    PADDED,
    TOKENS,
    assert_same,
    assert_unchanged,
    input_of,
    linear_layer,
    randomized,
    snapshot,
    value,
)
from merge_scenes import Factor, FactorAfterNorm, Scaled, Shifted, ShiftedInput, assert_exact
from timm.layers import LayerNorm2d
from torch import nn

from backbones import merge

ROWS = (slice(None), slice(2), slice(-2, None), slice(1, None, 2))


@BIAS
@pytest.mark.parametrize("kind", ["linear", "odd", "padded_grouped", "padded_multiplier", "same"])
def test_a_factor_per_channel_goes_into_the_outputs_before(kind, bias):
    for rows in ROWS:
        scene = Scaled(linear_layer(kind, bias), rows)
        assert_exact(scene, input_of(scene.linear))
        assert (scene.linear.bias is not None) == bias  # a factor needs no bias of its own


@BIAS
@pytest.mark.parametrize("kind", ["linear", "odd", "padded_grouped", "padded_multiplier", "same"])
def test_an_offset_goes_into_the_bias_before(kind, bias):
    for rows in ROWS:
        scene = Shifted(linear_layer(kind, bias), rows)
        weight = scene.linear.weight
        assert_exact(scene, input_of(scene.linear))
        assert scene.linear.weight is weight


@BIAS
@pytest.mark.parametrize("kind", EVERY_UNPADDED)
def test_an_offset_goes_into_the_layer_after(kind, bias):
    scene = ShiftedInput(linear_layer(kind, bias))
    assert_exact(scene, input_of(scene.linear))


@pytest.mark.parametrize("kind", PADDED)
def test_an_offset_before_a_padded_convolution_is_refused(kind):
    conv = randomized(linear_layer(kind))
    before = snapshot(conv)
    with pytest.raises(ValueError, match="it is no unpadded linear layer"):
        merge.shift_into_next(torch.ones(8), conv)
    assert_unchanged(conv, before)
    merge.shift_into_next(None, conv)  # nothing to move


@pytest.mark.parametrize("shape", [(6,), (6, 1, 1), (1, 6, 1, 1)])
def test_factors_and_offsets_may_have_the_shape_in_which_they_are_applied(shape):
    conv, x = randomized(linear_layer("padded")), torch.randn(FEATURE_MAP, dtype=torch.float64)
    scale, shift = torch.randn(2, *shape, dtype=torch.float64)
    expected = value(conv, x) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    merge.scale_into_previous(conv, scale)
    merge.shift_into_previous(conv, shift)
    assert_same(value(conv, x), expected)


def test_offsets_before_a_layer_may_have_the_shape_in_which_they_are_applied():
    conv, x = randomized(linear_layer("grouped")), torch.randn(FEATURE_MAP, dtype=torch.float64)
    shift = torch.randn(1, 8, 1, 1, dtype=torch.float64)
    expected = value(conv, x + shift)
    merge.shift_into_next(shift, conv)
    assert_same(value(conv, x), expected)


def test_nothing_given_is_nothing_done():
    linear = randomized(nn.Linear(8, 8))
    norm = randomized(nn.LayerNorm(8))
    before, norm_before = snapshot(linear), snapshot(norm)
    offset = torch.ones(8)
    with merge.recorded() as counts:
        merge.scale_into_previous(linear, None)
        merge.shift_into_previous(linear, None)
        merge.shift_into_next(None, linear)
        merge.shift_together(offset, None)
        merge.shift_together(None, offset)
        assert merge.factor_into_outputs(linear, 1.0) == 1.0
        assert merge.factor_into_norm(norm, 1.0) == 1.0
    assert not counts
    assert torch.equal(offset, torch.ones(8))
    assert_unchanged(linear, before)
    assert_unchanged(norm, norm_before)


@BIAS
@pytest.mark.parametrize("rows", ["slice", "mask", "no_rows", "all"])
@pytest.mark.parametrize("kind", ["linear", "padded_grouped", "even_strided"])
def test_a_constant_factor_goes_into_rows_of_the_layer_before(kind, rows, bias):
    chosen = {
        "slice": slice(1, 4),
        "mask": torch.tensor([True, False, False, True, True, False]),
        "no_rows": torch.zeros(6, dtype=torch.bool),
        "all": slice(None),
    }[rows]
    for factor in (-2.5, 0.0, 1e-3):
        scene = Factor(linear_layer(kind, bias), chosen, factor)
        assert_exact(scene, input_of(scene.linear))
        assert scene.factor == 1.0
        assert (scene.linear.bias is not None) == bias


@pytest.mark.parametrize("factor", [-2.5, 0.0, 1e-3])
@pytest.mark.parametrize("norm", [LayerNorm2d, nn.LayerNorm])
def test_a_constant_factor_goes_into_the_norm_before(norm, factor):
    scene = FactorAfterNorm(norm(8), factor)
    assert_exact(
        scene, torch.randn(FEATURE_MAP if norm is LayerNorm2d else TOKENS, dtype=torch.float64)
    )
    assert scene.factor == 1.0


def test_a_factor_goes_into_entries_of_a_parameter():
    parameter = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16))
    merge.scale_parameter(parameter, torch.tensor([0.0, -1.5]), slice(1, 3))
    assert parameter.tolist() == [1, 0, -4.5, 4]
    merge.scale_parameter(parameter, torch.full((4,), 2.0))
    assert parameter.tolist() == [2, 0, -9, 8]
    assert parameter.dtype == torch.bfloat16 and parameter.requires_grad


def test_one_offset_takes_the_other_and_leaves_it():
    offset, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.tensor([1.0, 0.0, -3.0]))
    merge.shift_together(offset, other)
    assert offset.tolist() == [2, 1, -2] and other.tolist() == [1, 0, -3]
