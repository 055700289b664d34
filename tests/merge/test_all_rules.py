"""What holds for all rules: exact, idempotent, any type, layout and device; and their count."""

from __future__ import annotations

import copy

import pytest
import torch
from merge_layers import input_of, linear_layer, randomized
from merge_scenes import EVERY_SCENE, SCENES, NormAfterLayer, NormBeforeLayer, assert_exact
from torch import nn

from backbones import merge


def test_every_public_rule_has_a_test_of_what_holds_for_all():
    no_rules = {
        "fold_chain",  # applies rules
        "is_linear_layer",  # only looks
        "is_unpadded",
        "record",  # counts
        "recorded",
    }
    called = {"drop_softmax_bias", "uniform_bias_into_next", "norm_into_next"}  # under other names
    assert set(merge.__all__) - no_rules - called <= set(SCENES)


@EVERY_SCENE
def test_exact_and_idempotent(name):
    assert_exact(SCENES[name]())


@EVERY_SCENE
def test_narrow_types_stay_and_are_rounded_once(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scene = randomized(SCENES[name]()).to(dtype)
        wide = copy.deepcopy(scene).double()
        scene.fold()
        wide.fold()
        found, expected = scene.state_dict(), wide.state_dict()
        assert list(found) == list(expected)
        for key, tensor in found.items():
            assert tensor.dtype == (dtype if tensor.is_floating_point() else torch.int64), key
            assert torch.equal(tensor, expected[key].to(tensor.dtype)), (key, dtype)


@EVERY_SCENE
def test_channels_last_weights_stay_so_and_give_the_same(name):
    scene = randomized(SCENES[name]())
    other = copy.deepcopy(scene).to(memory_format=torch.channels_last)
    old = [p for p in other.parameters() if p.ndim == 4]
    strides = [p.stride() for p in old]
    scene.fold()
    other.fold()
    assert [p.stride() for p in old] == strides
    expected = scene.state_dict()
    for key, tensor in other.state_dict().items():
        # Sums over channels run in another order.
        assert torch.allclose(tensor, expected[key], rtol=0, atol=1e-14), key


@EVERY_SCENE
def test_the_meta_device_gives_the_same_names_and_shapes(name):
    scene = randomized(SCENES[name]())
    other = copy.deepcopy(scene).to("meta")
    scene.fold()
    with merge.recorded() as counts:
        other.fold()
    assert counts == scene.counts
    found, expected = other.state_dict(), scene.state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in expected.items()}
    assert all(tensor.is_meta for tensor in found.values())


@EVERY_SCENE
def test_frozen_parameters_stay_frozen_and_new_ones_follow_the_weight(name):
    scene = randomized(SCENES[name]()).requires_grad_(False)
    scene.fold()
    assert not any(p.requires_grad for p in scene.parameters())


@EVERY_SCENE
def test_new_layers_are_in_evaluation_mode(name):
    scene = randomized(SCENES[name]())
    scene.fold()
    modules = [m for m in scene.modules() if not isinstance(m, nn.Identity)]
    assert not any(module.training for module in modules)


def test_one_frozen_layer_among_others_stays_frozen():
    scene = randomized(NormBeforeLayer(nn.BatchNorm2d(8), linear_layer("odd", bias=False)))
    scene.linear.requires_grad_(False)
    scene.fold()
    assert not scene.linear.weight.requires_grad and not scene.linear.bias.requires_grad
    scene = randomized(NormBeforeLayer(nn.BatchNorm2d(8), linear_layer("odd"))).requires_grad_(
        False
    )
    scene.linear.weight.requires_grad_(True)
    scene.fold()
    assert scene.linear.weight.requires_grad and not scene.linear.bias.requires_grad


def test_merged_layers_can_be_trained_further():
    scene = randomized(NormAfterLayer(linear_layer("padded", bias=False)))
    scene.fold()
    scene(input_of(scene.linear)).square().sum().backward()
    assert scene.linear.weight.grad.abs().max() > 0 and scene.linear.bias.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["stack_linear_layers", "rotation_into_next"])
def test_new_layers_take_the_memory_layout_of_the_old(name):
    scene = randomized(SCENES[name]()).to(memory_format=torch.channels_last)
    scene.fold()
    weights = [p for p in scene.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_recorded_counts_by_rule_and_nests():
    def scale(times):
        for _ in range(times):
            merge.scale_into_previous(nn.Linear(2, 2), torch.ones(2))

    with merge.recorded() as outer:
        scale(1)
        with merge.recorded() as inner:
            scale(2)
            merge.record("own")
        scale(3)
        merge.shift_into_previous(nn.Linear(2, 2), torch.ones(2))
    scale(1)
    merge.record("own")
    assert inner == {"layer scale into the linear layer before": 2, "own": 1}
    assert outer == {"layer scale into the linear layer before": 4, "offset into a bias": 1}


def test_recorded_ends_with_an_error_inside():
    with pytest.raises(KeyError), merge.recorded() as counts:
        raise KeyError
    merge.record("own")
    assert not counts
