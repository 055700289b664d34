"""Creating, listing and describing by name; what is asked for wrongly gets a way out."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from tiers import shallow

import backbones
from backbones.errors import (
    BackbonesError,
    CheckpointError,
    UnknownModelError,
    UnsupportedError,
    WeightsUnavailableError,
)

SMALL = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}


def tiny(**arguments):
    return backbones.create_model("convnext_atto", **{**SMALL, **arguments})


def test_lists():
    names = backbones.list_models()
    assert {"convnext_tiny", "inception_next_atto", "convnextv2_huge"} <= set(names)
    assert backbones.list_families() == sorted(backbones.list_families())
    assert backbones.list_models("convnext_tiny_k3_par*") == [
        f"convnext_tiny_k3_par{x}" for x in ("1_2", "1_4", "1_8", "1_16", "3_8")
    ]
    both = backbones.list_models(["convnext*_k5", "convnext*_k3"])
    assert both == ["convnext_tiny_k3", "convnext_tiny_k5"]
    family = backbones.list_models(family="inception_next")
    assert family == [f"inception_next_{s}" for s in ("atto", "base", "small", "tiny")]
    tagged = backbones.list_models("inception_next_base", pretrained=True)
    assert tagged[:2] == ["inception_next_base.sail_in1k", "inception_next_base.sail_in1k_384"]
    assert all(name.startswith("inception_next_base.") for name in tagged)
    free = backbones.list_models("convnext*", license="mit")
    assert "convnext_tiny.fb_in1k" in free
    assert not [name for name in free if "fcmae" in name]
    assert backbones.list_models("nothing*") == []


def test_info():
    info = backbones.model_info("inception_next_base.sail_in1k_384")
    assert info.input_size == (3, 384, 384)
    assert info.params == 86_672_040 or abs(info.params - 86.672e6) < 1e3
    assert abs(info.macs - 43.603e9) < 0.02e9
    assert info.licenses["sail_in1k"] == "apache-2.0"
    assert info.timm_name == "backbones_inception_next_base"
    assert "InceptionNeXt" in info.source.title
    at_224 = backbones.model_info("inception_next_base")
    assert at_224.input_size == (3, 224, 224)
    assert abs(at_224.macs - 14.841e9) < 0.01e9


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnext_tinny", "no model 'convnext_tinny'; did you mean 'convnext_tiny'"),
        ("resnet181", "did you mean .*resnet18"),
        ("zzzz", "no model 'zzzz'$"),
        ("convnext_tiny.fb_in1kk", "did you mean 'fb_in1k'.*tags of convnext_tiny: in12k_ft_in1k"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(UnknownModelError, match=message) as caught:
        backbones.create_model(name)
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, BackbonesError)
    assert "\\" not in str(caught.value)


def test_unknown_family():
    with pytest.raises(UnknownModelError, match="did you mean 'convnext'"):
        backbones.list_models(family="convnex")


def test_arguments_reach_the_constructor():
    model = tiny(num_classes=7, in_chans=1, drop_path_rate=0.2, global_pool="max")
    assert model.get_classifier().out_features == 7
    assert model.stem[0].in_channels == 1
    assert model.stages[3].blocks[0].drop_path.drop_prob == pytest.approx(0.2)
    assert model.arguments["num_classes"] == 7
    assert model.config["name"] == "convnext_atto"
    with pytest.raises(UnsupportedError, match="catavgmax"):
        tiny(global_pool="catavgmax")
    with pytest.raises(UnsupportedError, match="output_stride=4"):
        tiny(output_stride=4)


@pytest.mark.parametrize("feature_cls", ["getter", "hook", "fx"])
@torch.no_grad()
def test_every_way_of_taking_features_gives_the_same(feature_cls):
    arguments = {**SMALL, "features_only": True, "out_indices": (1, 3)}
    whole = tiny().eval()
    model = backbones.create_model("convnext_atto", feature_cls=feature_cls, **arguments).eval()
    body = next(
        m for m in (model, *model.children()) if "stages.0.blocks.0.gamma" in m.state_dict()
    )
    body.load_state_dict(whole.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 96)
    taps = whole.forward_intermediates(x, indices=(1, 3), intermediates_only=True)
    torch.testing.assert_close(list(model(x)), taps, rtol=0, atol=0)


def test_head_init_scale():
    torch.manual_seed(0)
    plain = tiny().get_classifier().weight
    torch.manual_seed(0)
    scaled = tiny(head_init_scale=0.001)
    torch.testing.assert_close(scaled.get_classifier().weight, plain * 0.001)
    scaled.reset_classifier(5)
    assert scaled.get_classifier().weight.abs().max() < 1e-3


@pytest.mark.parametrize("name", ["lsnet_t_distill", "glnet_4g_tklb", "uniformer_small_tl"])
def test_head_init_scale_is_of_all_classifiers(name):
    model = backbones.create_model(name, num_classes=5, head_init_scale=0.0, **shallow(name, 1))
    classifiers = model.head.classifiers()
    assert len(classifiers) == 2
    for classifier in classifiers.values():
        assert all(parameter.count_nonzero() == 0 for parameter in classifier.parameters())
    model.reset_classifier(7)
    for classifier in model.head.classifiers().values():
        assert all(parameter.count_nonzero() == 0 for parameter in classifier.parameters())


def test_saved_checkpoint_brings_its_arguments(tmp_path):
    model = tiny(num_classes=5, in_chans=1).eval()
    path = backbones.save_checkpoint(model, tmp_path / "mine.safetensors")
    again = backbones.create_model("convnext_atto", checkpoint_path=path).eval()
    x = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    wider = backbones.create_model("convnext_atto", checkpoint_path=path, num_classes=9)
    assert wider.get_classifier().out_features == 9
    torch.testing.assert_close(wider.stem[0].weight, model.stem[0].weight)
    color = backbones.create_model("convnext_atto", checkpoint_path=path, in_chans=3)
    torch.testing.assert_close(color.stem[0].weight.sum(1), model.stem[0].weight.sum(1))
    maps = backbones.create_model("convnext_atto", checkpoint_path=path, features_only=True)
    torch.testing.assert_close(maps.eval()(x)[-1], model.forward_features(x))


def test_a_checkpoint_brings_its_classes_and_a_new_classifier_is_asked_for(tmp_path):
    model = tiny(num_classes=5)
    path = tmp_path / "plain.pt"
    torch.save({"model": model.state_dict()}, path)
    with pytest.raises(CheckpointError, match="num_classes"):
        backbones.load_checkpoint(tiny(), path)
    same = backbones.create_model("convnext_atto", checkpoint_path=path, **SMALL)
    torch.testing.assert_close(same.state_dict(), model.state_dict())
    adapted = backbones.create_model("convnext_atto", checkpoint_path=path, num_classes=9, **SMALL)
    torch.testing.assert_close(adapted.stem[0].weight, model.stem[0].weight)


def test_missing_checkpoint_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such-file"):
        backbones.create_model("convnext_atto", checkpoint_path=tmp_path / "no-such-file.pth")


def test_offline_weights_say_where_they_are():
    with pytest.raises(WeightsUnavailableError, match="convnext_atto.d2_in1k.*checkpoint_path"):
        backbones.create_model("convnext_atto", pretrained=True)


def test_local_dir_round_trip(tmp_path):
    model = tiny(num_classes=5).eval()
    timm.models.save_for_hf(
        model, tmp_path, model_args={**SMALL, "num_classes": 5}, safe_serialization=True
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "backbones_convnext_atto"
    again = backbones.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(again) is type(model)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    by_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(by_timm(x), model(x), rtol=0, atol=0)
    random = backbones.create_model(f"local-dir:{tmp_path}", num_classes=3)
    assert random.num_classes == 3


def test_local_dir_without_config(tmp_path):
    with pytest.raises(ValueError, match=r"config.json: no such file"):
        backbones.create_model(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        backbones.create_model(f"local-dir:{tmp_path}")


def test_timms_overlay_goes_through_our_filter(tmp_path):
    """timm.create_model(ours, pretrained=True, overlay=file): authors' keys, other classes."""
    authors = torch.load(_authors_file(tmp_path), weights_only=True)
    overlay = {"file": str(tmp_path / "authors.pth")}
    model = timm.create_model(
        "backbones_convnext_atto",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        num_classes=3,
        in_chans=1,
    )
    weight = authors["model"]["stages.0.0.dwconv.weight"]
    torch.testing.assert_close(model.stages[0].blocks[0].conv_dw.weight, weight)
    assert model.get_classifier().out_features == 3
    broken = {"model": {k + "x": v for k, v in authors["model"].items()}}
    torch.save(broken, tmp_path / "authors.pth")
    with pytest.raises(CheckpointError, match="does not fit"):
        timm.create_model(
            "backbones_convnext_atto",
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            num_classes=3,
        )


def _authors_file(folder):
    rules = [("stem.", "downsample_layers.0."), ("conv_dw", "dwconv"), ("mlp.fc", "pwconv")]
    rules += [("head.norm.", "norm."), ("head.fc.", "head."), (".blocks.", ".")]
    state = {}
    for key, value in backbones.create_model("convnext_atto").state_dict().items():
        if ".downsample." in key:
            key = key.replace("stages.", "downsample_layers.").replace(".downsample.", ".")
        for ours, theirs in rules:
            key = key.replace(ours, theirs)
        state[key] = value
    path = folder / "authors.pth"
    torch.save({"model": state}, path)
    return path
