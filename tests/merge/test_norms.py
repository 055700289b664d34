"""Norms go into the linear layer before or after them, and stay where they cannot."""

from __future__ import annotations

import pytest
import torch
from merge_layers import (
    BIAS,
    EVERY_LAYER,
    EVERY_UNPADDED,
    FEATURE_MAP,
    GEOMETRIES,
    PADDED,
    TOKENS,
    UNPADDED,
    assert_unchanged,
    input_of,
    linear_layer,
    randomized,
    snapshot,
    value,
)
from merge_scenes import Centered, NormAfterLayer, NormBeforeLayer, assert_exact
from timm.layers import LayerNorm2d
from torch import nn

from backbones import merge

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@BIAS
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", EVERY_LAYER)
def test_a_batch_norm_goes_into_the_layer_before(kind, affine, bias):
    scene = NormAfterLayer(linear_layer(kind, bias), affine=affine, eps=1e-3)
    assert type(assert_exact(scene, input_of(scene.linear)).norm) is nn.Identity


@BIAS
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", EVERY_UNPADDED)
def test_a_batch_norm_goes_into_the_layer_after(kind, affine, bias):
    norm = nn.BatchNorm1d if kind == "linear" else nn.BatchNorm2d
    scene = NormBeforeLayer(norm(8, affine=affine, eps=1e-3), linear_layer(kind, bias))
    assert type(assert_exact(scene, input_of(scene.linear)).norm) is nn.Identity


NORMS = {
    "layer": lambda: LayerNorm2d(8),
    "layer_no_offset": lambda: LayerNorm2d(8, bias=False),
    "layer_no_factor": lambda: without(LayerNorm2d(8), "weight"),
    "group": lambda: nn.GroupNorm(2, 8),
    "group_no_factor": lambda: without(nn.GroupNorm(1, 8), "weight"),
    "group_no_offset": lambda: without(nn.GroupNorm(8, 8), "bias"),
}


def without(norm, name):
    setattr(norm, name, None)
    return norm


@BIAS
@pytest.mark.parametrize("kind", UNPADDED)
def test_factor_and_offset_of_a_norm_go_into_the_convolution_after(kind, bias):
    for make in NORMS.values():
        norm = make()
        assert assert_exact(NormBeforeLayer(norm, linear_layer(kind, bias))).norm is norm
        assert norm.weight is None and norm.bias is None


@BIAS
@pytest.mark.parametrize("offset", [True, False])
def test_factor_and_offset_of_a_layer_norm_go_into_the_linear_layer_after(offset, bias):
    scene = NormBeforeLayer(nn.LayerNorm(8, bias=offset), nn.Linear(8, 6, bias=bias))
    assert_exact(scene, torch.randn(TOKENS, dtype=torch.float64))


def test_a_norm_before_a_layer_over_another_axis_stays():
    for norm in (nn.GroupNorm(2, 8), nn.BatchNorm2d(8), LayerNorm2d(8)):
        scene = randomized(NormBeforeLayer(norm, nn.Linear(8, 6)))
        before = snapshot(scene)
        scene.fold()
        assert scene.norm is norm
        assert_unchanged(scene, before)


@pytest.mark.parametrize("kind", PADDED)
def test_a_norm_before_a_padded_convolution_stays(kind):
    for norm in (nn.BatchNorm2d(8), *(make() for make in NORMS.values())):
        scene = randomized(NormBeforeLayer(norm, linear_layer(kind)))
        before = snapshot(scene)
        with merge.recorded() as counts:
            scene.fold()
        assert scene.norm is norm and not counts
        assert_unchanged(scene, before)


NO_AFFINE = [
    LayerNorm2d(8, affine=False),
    nn.LayerNorm(8, elementwise_affine=False),
    nn.GroupNorm(2, 8, affine=False),
    nn.InstanceNorm2d(8, affine=True),
    nn.ReLU(),
    nn.Identity(),
]


@pytest.mark.parametrize("other", NO_AFFINE, ids=lambda m: type(m).__name__)
def test_what_has_no_parameters_to_move_stays(other):
    conv = randomized(linear_layer("1x1"))
    before = snapshot(conv)
    with merge.recorded() as counts:
        assert merge.norm_into_next(other, conv) is other
        assert merge.norm_into_previous(conv, other) is other
    assert not counts
    assert_unchanged(conv, before)


@pytest.mark.parametrize("norm", [LayerNorm2d(6), nn.GroupNorm(2, 6)])
def test_statistics_of_the_input_do_not_go_into_the_layer_before(norm):
    conv = randomized(linear_layer("1x1"))
    before = snapshot(conv)
    assert merge.norm_into_previous(conv, norm) is norm
    assert_unchanged(conv, before)


def test_a_batch_norm_without_running_statistics_is_refused():
    norm, linear = nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 8)
    with pytest.raises(ValueError, match="running statistics"):
        merge.norm_into_previous(linear, norm)
    with pytest.raises(ValueError, match="running statistics"):
        merge.norm_into_next(norm, linear)


@BIAS
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [k for k, o in GEOMETRIES.items() if "groups" not in o])
def test_a_centered_norm_after_centered_outputs_is_the_layer_norm(kind, affine, bias):
    scene = assert_exact(Centered(linear_layer(kind, bias), affine=affine))
    y = value(scene.conv, torch.randn(FEATURE_MAP, dtype=torch.float64))
    assert y.mean(1).abs().max() < 1e-13 * y.abs().max()
