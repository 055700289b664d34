"""What is particular to HorNet: global filters of any size, and mmpretrain's names."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from golden import fill

import backbones
from backbones.errors import CheckpointError, ConfigError
from backbones.families.hornet import GlobalLocalFilter

PARAMETERS = {
    "hornet_tiny_7x7": 22409512,
    "hornet_tiny_gf": 22991848,
    "hornet_small_7x7": 49528264,
    "hornet_small_gf": 50401768,
    "hornet_base_7x7": 87256680,
    "hornet_base_gf": 88421352,
    "hornet_base_gf_img384": 92099560,
    "hornet_large_7x7": 194542504,
    "hornet_large_gf": 196289512,
    "hornet_large_gf_img384": 201806824,
}
SMALL = {"depths": [1, 1, 2, 1], "dims": [16, 32, 64, 128], "num_classes": 7}


def small(name="hornet_tiny_gf", **arguments):
    """A narrow float64 model with filled weights."""
    model = backbones.create_model(name, **{**SMALL, **arguments}, dtype=torch.float64).eval()
    backbones.load_checkpoint(
        model, {key: fill(key, tuple(value.shape)) for key, value in model.state_dict().items()}
    )
    return model


def test_parameter_counts():
    assert list(PARAMETERS) and set(PARAMETERS) == set(backbones.list_models(family="hornet"))
    for name, count in PARAMETERS.items():
        model = backbones.create_model(name, device="meta")
        assert sum(p.numel() for p in model.parameters()) == count, name


@pytest.mark.parametrize("size", [(14, 14), (12, 16), (13, 15), (3, 1), (24, 8)])
@torch.no_grad()
def test_global_local_filter_is_its_formula_at_every_size(size):
    """Both halves and their order, with the spectrum taken by the definition of the transform."""
    mixer = GlobalLocalFilter(6, (14, 8)).double()
    for key, value in mixer.state_dict().items():
        value.copy_(fill(key, tuple(value.shape)))
    height, width = size
    x = torch.randn(2, 6, height, width, dtype=torch.float64)
    weight, bias = mixer.pre_norm.weight, mixer.pre_norm.bias
    local, spread = (
        F.layer_norm(x.movedim(1, -1), (6,), weight, bias, 1e-6).movedim(-1, 1).chunk(2, 1)
    )
    local = F.conv2d(local, mixer.conv_dw.weight, padding=1, groups=3)
    parts = mixer.complex_weight.permute(3, 0, 1, 2)
    parts = F.interpolate(parts, (height, width // 2 + 1), mode="bilinear", align_corners=True)
    # the filter is a circular convolution with this kernel
    kernel = torch.fft.irfft2(torch.complex(*parts.contiguous()), s=size)
    filtered = torch.zeros_like(spread)
    for i in range(height):
        for j in range(width):
            filtered += kernel[:, i, j].view(-1, 1, 1) * spread.roll((i, j), (2, 3))
    expected = torch.empty_like(x)
    expected[:, 0::2], expected[:, 1::2] = local, filtered
    weight, bias = mixer.post_norm.weight, mixer.post_norm.bias
    expected = F.layer_norm(expected.movedim(1, -1), (6,), weight, bias, 1e-6).movedim(-1, 1)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_filters_of_another_size_are_resized_when_loaded():
    """Once when loaded or on every forward is the same at the size that they are resized for."""
    native = small()
    larger = small(filter_sizes=[None, None, [24, 13], [12, 7]])
    state = native.state_dict()
    assert not backbones.load_checkpoint(larger, state).missing
    x = torch.randn(1, 3, 384, 384, dtype=torch.float64)
    torch.testing.assert_close(larger(x), native(x), rtol=1e-9, atol=1e-9)
    assert state["stages.2.blocks.0.gnconv.mixer.complex_weight"].shape[1:3] == (14, 8)
    halved = {key: value.bfloat16() for key, value in state.items()}
    assert not backbones.load_checkpoint(larger, halved).missing


def test_filters_of_another_width_are_refused():
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    key = "stages.3.blocks.0.gnconv.mixer.complex_weight"
    with pytest.raises(CheckpointError, match=re.escape(key)):
        backbones.load_checkpoint(model, {**before, key: before[key][1:]})
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@torch.no_grad()
def test_mmpretrain_layout_loads():
    model = small()
    theirs = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)
        key = key.replace(".blocks.", ".").replace(".mlp.fc", ".pwconv")
        key = key.replace(".mixer.conv_dw.", ".dwconv.dw.").replace(".mixer.", ".dwconv.")
        key = key.replace(".pws.", ".projs.").replace("head.norm.", "norm3.")
        key = re.sub(r"\.(gamma\d)$", r".\1.weight", key)
        theirs[key if key.startswith("head.") else f"backbone.{key}"] = value
    fresh = backbones.create_model("hornet_tiny_gf", **SMALL, dtype=torch.float64).eval()
    report = backbones.load_checkpoint(fresh, {"state_dict": theirs})
    assert report.layout == "mmpretrain"
    assert report.loaded == len(theirs) == len(model.state_dict())
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)


@torch.no_grad()
def test_autocast_agrees_with_float32():
    model = small().float()
    x = torch.randn(1, 3, 64, 96)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    assert mixed.dtype == torch.bfloat16
    expected = model(x)
    assert (mixed.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixers": ["dwconv", "dwconv", "fft", "gf"]}, "no mixer 'fft'"),
        ({"filter_sizes": [None, None, [14, 8], None]}, "stage 3 .* needs"),
        ({"orders": [2, 3, 4, 8]}, "stage 3 cannot be halved 8 times"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message):
    with pytest.raises(ConfigError, match=message):
        backbones.create_model("hornet_tiny_gf", device="meta", **{**SMALL, **arguments})


def test_mixers_alternate_within_a_stage():
    model = backbones.create_model(
        "hornet_tiny_gf",
        mixers=["dwconv", "dwconv", ["gf", "dwconv"], "gf"],
        device="meta",
        **SMALL,
    )
    kinds = [type(block.gnconv.mixer).__name__ for block in model.stages[2].blocks]
    assert kinds == ["GlobalLocalFilter", "Conv2d"]
