"""load_model: a checkpoint becomes the model that it says it is, in one call."""

from __future__ import annotations

import pytest
import timm
import torch
from randomized import randomize
from tiers import shallow, smallest_of_each_family, smallest_size

import backbones
from backbones.errors import (
    CheckpointError,
    ConfigError,
    UnknownModelError,
    WeightsUnavailableError,
)
from backbones.weights import untrusted

SMALLEST = pytest.mark.parametrize("name", smallest_of_each_family())


def filled(name, **arguments):
    return randomize(
        backbones.create_model(name, **{**shallow(name, blocks=1), **arguments})
    ).eval()


def logits(model):
    size = (2, model.in_chans, smallest_size(model), smallest_size(model))
    with torch.no_grad():
        return model(torch.randn(size, generator=torch.Generator().manual_seed(1)))


@SMALLEST
@pytest.mark.parametrize("deploy", [False, True])
def test_a_file_of_ours_says_all_itself(name, deploy, tmp_path):
    model = filled(name, num_classes=3, in_chans=1)
    model.pretrained_cfg["crop_pct"] = 0.77
    if deploy:
        model = backbones.reparameterize(model)
    path = tmp_path / "m.safetensors"
    backbones.save_checkpoint(model, path, classes=["a", "b", "c"])
    loaded = backbones.load_model(path)
    assert not loaded.training
    assert loaded.deployed is deploy
    assert loaded.config["name"] == model.config["name"]
    assert loaded.arguments == model.arguments
    assert loaded.pretrained_cfg["crop_pct"] == 0.77
    assert loaded.pretrained_cfg["label_names"] == ["a", "b", "c"]
    assert torch.equal(logits(loaded), logits(model))


@SMALLEST
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_file_of_others_takes_a_name_and_tells_its_sizes(name, whole, tmp_path):
    fewer = {} if whole else shallow(name)
    model = randomize(backbones.create_model(name, num_classes=7, in_chans=4, **fewer)).eval()
    wrapped = {"model": {f"module.{key}": value for key, value in model.state_dict().items()}}
    torch.save(wrapped, tmp_path / "m.pth")
    loaded = backbones.load_model(tmp_path / "m.pth", name, **fewer)
    assert (loaded.num_classes, loaded.in_chans, loaded.training) == (7, 4, False)
    assert torch.equal(logits(loaded), logits(model))
    merged = backbones.load_model(tmp_path / "m.pth", name, deploy=True, **fewer)
    assert merged.deployed
    assert torch.allclose(logits(merged), logits(model), atol=1e-3)


def test_models_of_timm(tmp_path):
    model = timm.create_model("resnet18", num_classes=5).eval()
    torch.save(model.state_dict(), tmp_path / "m.pth")
    loaded = backbones.load_model(tmp_path / "m.pth", "resnet18")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(x), model(x))
    backbones.save_checkpoint(model, tmp_path / "m.safetensors", classes=list("abcde"))
    again = backbones.load_model(tmp_path / "m.safetensors")
    assert torch.equal(again(x), model(x))
    assert again.pretrained_cfg["label_names"] == list("abcde")


def test_a_variant_of_ones_own_needs_no_yaml(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "family: convnext\nvariants:\n  mine:\n    like: convnext_atto\n    depths: [1, 1, 1, 1]\n"
    )
    model = randomize(backbones.create_model(str(tmp_path / "mine.yaml"), num_classes=2)).eval()
    path = backbones.save_checkpoint(model, tmp_path / "m.safetensors")
    (tmp_path / "mine.yaml").unlink()
    loaded = backbones.load_model(path)
    assert loaded.config["name"] == "mine"
    assert torch.equal(logits(loaded), logits(model))


def test_overrides_count_most(tmp_path):
    path = backbones.save_checkpoint(filled("convnext_atto"), tmp_path / "m.safetensors")
    loaded = backbones.load_model(path, num_classes=2, drop_path_rate=0.3)
    assert loaded.num_classes == 2
    assert loaded.drop_path_rate == 0.3
    maps = backbones.load_model(path, features_only=True)(torch.randn(1, 3, 64, 64))
    assert [x.shape[-1] for x in maps] == [16, 8, 4, 2]


def test_bad_input_is_named(tmp_path):
    model = filled("convnext_atto", num_classes=2)
    plain = tmp_path / "m.pth"
    torch.save(model.state_dict(), plain)
    with pytest.raises(ConfigError, match=r"m\.pth does not say which model.*--name NAME"):
        backbones.load_model(plain)
    with pytest.raises(UnknownModelError, match="did you mean 'convnext_atto'"):
        backbones.load_model(plain, "convnext_attoo")
    with pytest.raises(CheckpointError, match=r"m\.pth: does not fit lsnet_t"):
        backbones.load_model(plain, "lsnet_t")
    with pytest.raises(WeightsUnavailableError, match="no such file"):
        backbones.load_model(tmp_path / "none.pth")
    saved = backbones.save_checkpoint(model, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="does not fit convnext_femto"):
        backbones.load_model(saved, "convnext_femto")


def test_the_file_is_read_once(tmp_path, monkeypatch):
    path = backbones.save_checkpoint(filled("convnext_atto"), tmp_path / "m.safetensors")
    parsed = []
    original = untrusted.reading.parse_header
    monkeypatch.setattr(
        untrusted.reading, "parse_header", lambda *given: parsed.append(1) or original(*given)
    )
    backbones.load_model(path)
    backbones.create_model("convnext_atto", checkpoint_path=path)
    assert len(parsed) == 2
