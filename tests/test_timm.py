"""Side by side with timm: same keys, same numbers, and nothing of timm's is touched."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from tiers import by_size, parameters_of

import backbones
from backbones.registry import registry

OWNED = [name for name, v in registry.variants.items() if v.timm_name and timm.is_model(name)]
SMALL = [name for name in OWNED if parameters_of(name) < 31e6]


def fill(model):
    """Random values of order one everywhere, so that no branch is silent."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in model.state_dict().items():
        if not value.is_floating_point():
            state[key] = value
        elif key.endswith("running_var"):
            state[key] = torch.rand(value.shape, generator=generator, dtype=value.dtype) + 0.5
        else:
            scale = 0.3 / max(1, value[0].numel() if value.ndim > 1 else 1) ** 0.5
            state[key] = scale * torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return state


@pytest.mark.parametrize("name", OWNED)
def test_state_dict_is_key_for_key_timms(name):
    ours = backbones.create_model(name, device="meta").state_dict()
    theirs = timm.create_model(name, device="meta").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("name", [param for param in by_size() if param.values[0] in SMALL])
@torch.no_grad()
def test_outputs_equal_timms(name):
    theirs = timm.create_model(name, dtype=torch.float64).eval()
    ours = backbones.create_model(name, dtype=torch.float64).eval()
    assert type(ours) is not type(theirs)
    state = fill(theirs)
    theirs.load_state_dict(state, strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for height, width in ((64, 64), (75, 90)):
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        expected = theirs(x)
        assert (ours(x) - expected).abs().max() < 1e-12 * expected.abs().max()
        maps = ours.forward_intermediates(x, intermediates_only=True)
        wanted = theirs.forward_intermediates(x, intermediates_only=True)
        for actual, target in zip(maps, wanted):
            assert (actual - target).abs().max() < 1e-12 * target.abs().max()


DILATABLE = [n for n in SMALL if registry.classes[registry.variants[n].family].dilatable]


@pytest.mark.parametrize("name", [n for n in DILATABLE if parameters_of(n) < 5e6])
@pytest.mark.parametrize("output_stride", [8, 16])
@torch.no_grad()
def test_dilated_outputs_equal_timms(name, output_stride):
    arguments = {"output_stride": output_stride, "dtype": torch.float64}
    theirs = timm.create_model(name, **arguments).eval()
    ours = backbones.create_model(name, **arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OWNED)
def test_default_tag_and_preprocessing_are_timms(name):
    ours = backbones.create_model(name, device="meta").pretrained_cfg
    theirs = timm.models.get_pretrained_cfg(name)
    assert ours["tag"] == theirs.tag
    model = backbones.create_model(name, device="meta")
    assert timm.data.resolve_model_data_config(model) == timm.data.resolve_data_config(
        pretrained_cfg=theirs.to_dict()
    )


def test_timms_own_names_are_untouched():
    program = """
import timm
names = timm.list_models("convnext*") + timm.list_models("inception_next*")
before = {n: (timm.models.model_entrypoint(n), timm.models.get_pretrained_cfg(n)) for n in names}
import backbones
for name, (entry, cfg) in before.items():
    assert timm.models.model_entrypoint(name) is entry, name
    assert timm.models.get_pretrained_cfg(name) == cfg, name
assert type(timm.create_model("convnext_tiny", device="meta")).__module__.startswith("timm.")
ours = timm.list_models(module="backbones")
assert "backbones_convnext_tiny" in ours and "convnext_tiny_k3" in ours, ours
assert "backbones_convnext_tiny.fb_in1k" in timm.list_pretrained("backbones_convnext_tiny*")
print(len(ours))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # an unlisted collision would warn
    aliases = len(registry.aliases)
    assert int(result.stdout) == len(backbones.list_models()) + aliases


def test_state_dict_moves_between_ours_and_timms():
    ours = backbones.create_model("convnext_tiny").eval()
    theirs = timm.create_model("convnext_tiny").eval()
    assert type(theirs).__module__ == "timm.models.convnext"
    assert type(ours).__module__ == "backbones.families.convnext.model"
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", by_size())
def test_preprocessing_resolves_for_every_tag(name):
    for tag in backbones.model_info(name).tags[:3]:
        model = backbones.create_model(f"{name}.{tag}", device="meta")
        data = timm.data.resolve_model_data_config(model)
        entry = backbones.manifest.load_manifest().entries[f"{name}.{tag}"]
        assert list(data["input_size"]) == list(entry.input_size)
        assert list(data["mean"]) == list(entry.mean)
        assert data["crop_pct"] == entry.crop_pct
        assert data["crop_mode"] == entry.crop_mode


def test_other_names_pass_through_to_timm():
    model = backbones.create_model("resnet18", num_classes=3, in_chans=1, device="meta")
    assert type(model) is timm.models.ResNet
    assert model.num_classes == 3
    features = backbones.create_model("resnet18", features_only=True, out_indices=(1, 2))
    assert features.feature_info.reduction() == [4, 8]
