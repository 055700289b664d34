"""What every variant owes, checked on the meta device, where nothing is computed."""

from __future__ import annotations

import pytest
import timm
import torch
from tiers import by_size, families_by_default, smallest_size

import backbones
from backbones.registry import registry

EVERY = pytest.mark.parametrize("name", backbones.list_models())
BY_SIZE = pytest.mark.parametrize("name", by_size())  # what takes a second even without numbers


def on_meta(name, **arguments):
    return backbones.create_model(name, device="meta", **arguments)


@EVERY
def test_builds_without_memory_and_says_nothing(name, capfd):
    model = on_meta(name)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert capfd.readouterr() == ("", "")


@BY_SIZE
def test_classifier_first_convolution_and_registry_agree(name):
    model = on_meta(name)
    keys = model.state_dict()
    cfg = model.pretrained_cfg
    names = cfg["classifier"] if isinstance(cfg["classifier"], tuple) else (cfg["classifier"],)
    assert all(f"{classifier}.weight" in keys for classifier in names)
    assert f"{model.first_conv}.weight" in keys
    variant = registry.variants[name]
    twin = timm.create_model(variant.timm_name or name, device="meta")
    assert type(twin) is type(model) is registry.classes[variant.family]
    assert {k: v.shape for k, v in twin.state_dict().items()} == {
        k: v.shape for k, v in keys.items()
    }


@EVERY
def test_unknown_argument_raises(name):
    with pytest.raises(TypeError, match="no_such_argument"):
        on_meta(name, no_such_argument=1)


@BY_SIZE
def test_input_channels(name):
    model = on_meta(name, in_chans=4).eval()
    side = smallest_size(model)
    assert model(torch.empty(1, 4, side, side, device="meta")).shape == (1, 1000)
    weight = model.get_submodule(model.first_conv).weight
    assert weight.shape[1] == 4


@BY_SIZE
def test_class_counts_and_pooling(name):
    model = on_meta(name, num_classes=10).eval()
    features = model.forward_features(torch.empty(2, 3, 128, 192, device="meta"))
    assert model.forward_head(features).shape == (2, 10)
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, model.head_hidden_size)
    headless = on_meta(name, num_classes=0).eval()
    assert headless.forward_head(features).shape == hidden.shape
    unpooled = on_meta(name, num_classes=0, global_pool="").eval()
    stride = model.feature_info[-1]["reduction"]
    shape = (2, model.head_hidden_size, 128 // stride, 192 // stride)
    assert unpooled.forward_head(features).shape == shape


@BY_SIZE
def test_features_have_the_promised_channels_and_strides(name):
    model = on_meta(name, features_only=True).eval()
    maps = model(torch.empty(1, 3, 128, 192, device="meta"))
    channels, strides = model.feature_info.channels(), model.feature_info.reduction()
    assert len(maps) == len(channels) >= 3
    for map_, channel, stride in zip(maps, channels, strides):
        assert map_.shape == (1, channel, 128 // stride, 192 // stride)


@EVERY
def test_twin_has_the_same_shapes(name):
    model = on_meta(name, num_classes=7)
    assert model.expected_shapes() == {k: v.shape for k, v in model.state_dict().items()}


@EVERY
def test_every_parameter_is_in_a_layer_group_of_its_own_depth(name):
    model = on_meta(name)
    layers = timm.models.group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert set(layers) == {n for n, _ in model.named_parameters()}
    head = {layers[n] for n in layers if n.startswith("head.")}
    body = {layers[n] for n in layers if not n.startswith("head.")}
    assert len(body) > 4
    assert head == {max(layers.values())}
    assert max(body) < max(layers.values())
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert 2 < len(set(coarse.values())) < len(set(layers.values()))


@EVERY
def test_no_weight_decay_names_parameters(name):
    model = on_meta(name)
    assert model.no_weight_decay() <= {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("name", families_by_default())
def test_info_counts_what_is_built(name):
    info = backbones.model_info(name)
    model = on_meta(name)
    assert info.params == sum(p.numel() for p in model.parameters())
    assert 0.05e9 < info.macs < 500e9
    larger = backbones.info.count_macs(model, (3, 448, 448))
    at_224 = backbones.info.count_macs(model, (3, 224, 224))
    assert 3.5 < larger / at_224 < 6
