"""Checkpoints of other trainers: the model is found by what fits, and nothing is guessed."""

from __future__ import annotations

import argparse
import json
import logging

import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from weights_toy import Getter, Toy, assert_same, authors, filled, snapshot

import backbones
from backbones.errors import BackbonesError, CheckpointError, ConfigError
from backbones.weights import load_checkpoint, unwrap

STATE = filled()
OTHER = filled(seed=2)
SMALL = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
ADAM = {"state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(4, 3, 2, 2)}}}
ODD_NAMES = ("c#", "what?", "x@y", "[z]", "a b", "100%20", "v1.yaml#x")
OPTIMIZER = {**ADAM, "param_groups": [{"lr": 0.1, "params": [0]}]}


def under(prefix, state=STATE):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("layout", [dict, authors], ids=["own", "authors"])
@pytest.mark.parametrize(
    "prefix",
    [
        "timm_model.",
        "net.",
        "0.",
        "0.model.",
        "student.",
        "ema_model.",
        "feature_extractor.",
        "_forward_module.",
        "_fsdp_wrapped_module.",
        "base_model.model.",
        "img_encoder.trunk.",
        "a.name.of.my.own.7.",
    ],
)
def test_any_prefix(prefix, layout):
    model = Toy()
    report = load_checkpoint(model, under(prefix, layout(STATE)))
    assert_same(model, STATE)
    assert report.prefix == prefix
    assert prefix in str(report)
    assert not report.ignored


def test_a_prefix_with_other_parts_beside_it():
    """A text tower, a projection, a loss with numbers of its own: ignored, and listed."""
    file = under("visual.trunk.", authors(STATE))
    file |= {f"text.blocks.{i}.weight": torch.ones(4, 4) for i in range(60)}
    file |= {"visual.proj": torch.ones(4, 4), "logit_scale": torch.ones(())}
    model = Toy()
    report = load_checkpoint(model, file)
    assert_same(model, STATE)
    assert report.prefix == "visual.trunk."
    assert {"logit_scale", "text.blocks.0.weight"} <= set(report.ignored)


def test_a_classifier_beside_the_prefix_is_taken():
    file = {("" if k.startswith("head") else "encoder.") + k: v for k, v in STATE.items()}
    model = Toy()
    assert load_checkpoint(model, file).prefix == "encoder."
    assert_same(model, STATE)


@pytest.mark.parametrize(
    "words",
    [
        ("_fsdp_wrapped_module",),
        ("_orig_mod",),
        ("_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
        ("module",),
        ("wrapped_by_me",),
    ],
)
@pytest.mark.parametrize("layout", [dict, authors], ids=["own", "authors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_fsdp_wrapped_module.", "net."])
def test_wrappers_of_inner_modules(words, layout, prefix):
    """As FSDP, activation checkpointing and torch.compile of single blocks name them."""
    state = {}
    for key, value in layout(STATE).items():
        for block in ("stages.0.1.", "stages.1.0.", "layers0_1.", "layers1_0."):
            if key.startswith(block):
                key = key.replace(block, block + "".join(f"{word}." for word in words))
        state[prefix + key] = value
    model = Toy()
    report = load_checkpoint(model, state)
    assert_same(model, STATE)
    assert set(words) <= set(report.inner)
    assert words[0] in str(report)


def test_no_family_has_names_that_wrappers_use():
    for family in backbones.list_families():
        name = backbones.list_models(family=family)[0]
        for key in backbones.create_model(name, device="meta").state_dict():
            assert not [w for w in key.split(".") if w.startswith("_") or w == "module"], key


@pytest.mark.parametrize(
    "wrapper",
    ["model_state_dict", "teacher", "student", "net", "weights", "params", "backbone", "G"],
)
@pytest.mark.parametrize("inside", [None, "state_dict", "model", "inner"])
def test_any_wrapper(wrapper, inside):
    """PyTorch's tutorial saves epoch, optimizer_state_dict and loss beside model_state_dict."""
    content = {wrapper: {inside: STATE} if inside else STATE}
    file = {"epoch": 3, **content, "optimizer_state_dict": OPTIMIZER, "loss": torch.tensor(0.3)}
    model = Toy()
    report = load_checkpoint(model, file)
    assert_same(model, STATE)
    place = report.wrapper or report.prefix
    assert wrapper in place
    assert inside is None or inside in place
    del file["loss"]
    tensors, found = unwrap(file)
    assert found == ".".join(filter(None, (wrapper, inside)))
    assert tensors.keys() == STATE.keys()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("names", [("student", "teacher"), ("model_state_dict", "ema_state_dict")])
def test_averages_are_taken_before_what_they_average(names, nested):
    raw, averaged = names
    file = {averaged: STATE, raw: OTHER, "optimizer": OPTIMIZER}
    if not nested:
        file = {**under(f"{averaged}.", STATE), **under(f"{raw}.", OTHER)}
    model = Toy()
    report = load_checkpoint(model, file)
    assert_same(model, STATE)
    assert report.prefix == f"{averaged}."
    assert any(raw in name for name in report.passed_over)
    assert f"passed over 1: {raw}" in str(report)


def test_what_was_passed_over_is_said_of_known_wrappers():
    report = load_checkpoint(Toy(), {"model": OTHER, "model_ema": STATE, "optimizer": OPTIMIZER})
    assert (report.wrapper, report.passed_over) == ("model_ema", ("model",))


def test_of_a_teacher_of_another_architecture_the_student_is_taken():
    file = {"teacher": filled(dim=8), "student": STATE}
    model = Toy()
    assert load_checkpoint(model, file).prefix == "student."
    assert_same(model, STATE)
    report = load_checkpoint(model, {"model": filled(dim=8), "student": STATE})
    assert (report.wrapper, report.prefix, report.passed_over) == (None, "student.", ())


def test_two_models_that_fit_alike_are_ambiguous():
    for file in ({"a": STATE, "b": OTHER}, {**under("nets.0."), **under("nets.1.", OTHER)}):
        model = Toy()
        before = snapshot(model)
        with pytest.raises(CheckpointError, match="several sets of weights that fit toy_t, below"):
            load_checkpoint(model, file)
        assert_same(model, before)
    assert load_checkpoint(Toy(), {"a": STATE, "b": dict(STATE)}).prefix == "a."


@pytest.mark.parametrize(
    "file",
    [
        {"optimizer_state_dict": OPTIMIZER},
        {"optimizer": {"exp_avg": STATE}},
        {"state": {key: {"exp_avg": value} for key, value in STATE.items()}, "param_groups": []},
    ],
)
def test_the_state_of_an_optimizer_is_no_model(file):
    with pytest.raises(CheckpointError):
        load_checkpoint(Toy(), file)
    model = Toy()
    load_checkpoint(model, {**file, "net": STATE})
    assert_same(model, STATE)


def test_lightning():
    file = {
        "pytorch-lightning_version": "2.5.0",
        "hyper_parameters": {"lr": 0.1},
        "state_dict": {**under("model."), "criterion.weight": torch.ones(5)},
        "optimizer_states": [OPTIMIZER],
    }
    model = Toy()
    report = load_checkpoint(model, file)
    assert_same(model, STATE)
    assert (report.wrapper, report.prefix) == ("state_dict", "model.")
    assert "criterion.weight" in report.ignored


def test_incomplete_files_are_refused_and_the_best_place_named():
    state = under("net.")
    del state["net.stages.1.1.conv.weight"]
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(Toy(), {**state, "neck.weight": torch.ones(3)})
    message = str(caught.value)
    assert "without the prefix 'net.'" in message
    assert "missing (1): 'stages.1.1.conv.weight'" in message
    assert "incomplete" in message and "create the variant" not in message
    assert load_checkpoint(Getter(Toy()), state).prefix == "net."  # needs the first stage only


def test_messages_point_in_the_right_direction():
    renamed = {f"p{i}": value for i, value in enumerate(STATE.values())}
    with pytest.raises(CheckpointError, match="names of no known layout; rename them"):
        load_checkpoint(Toy(), renamed)
    headless = {key: value for key, value in STATE.items() if not key.startswith("head.fc")}
    with pytest.raises(CheckpointError, match="has no classifier; create the model with"):
        load_checkpoint(Toy(), headless)


def test_hostile_names_take_no_time_or_memory():
    """Long names in nested mappings are not multiplied; deep names are not followed without end."""
    deep = {"x" * 100_000: {f"k{i}": {"y": torch.ones(1)} for i in range(2000)}, "net": STATE}
    model = Toy()
    load_checkpoint(model, deep)
    assert_same(model, STATE)
    dots = {".".join("a" * 500) + f".{i}": torch.ones(1) for i in range(3000)}
    with pytest.raises(CheckpointError, match="does not fit"):
        load_checkpoint(Toy(), dots)


# The number of classes, and a new classifier.


@pytest.fixture
def trained(tmp_path):
    """A model of ten classes as another trainer saves it, without metadata."""
    model = backbones.create_model("convnext_atto", num_classes=10).eval()
    nn.init.normal_(model.head.fc.weight)
    path = tmp_path / "trained.pth"
    torch.save({"model_state_dict": under("net.", model.state_dict()), "epoch": 3}, path)
    return path, model


def test_the_number_of_classes_is_the_files(trained):
    path, model = trained
    for made in (
        backbones.create_model("convnext_atto", checkpoint_path=path),
        backbones.load_model(path, "convnext_atto"),
    ):
        assert made.num_classes == 10
        assert torch.equal(made.head.fc.weight, model.head.fc.weight)
    assert (
        backbones.create_model("convnext_atto", checkpoint_path=path, deploy=True).num_classes == 10
    )
    maps = backbones.create_model("convnext_atto", checkpoint_path=path, features_only=True)
    assert len(maps(torch.zeros(1, 3, 32, 32))) == 4
    assert backbones.create_model("convnext_atto", checkpoint_path=path, num_classes=0)
    own = backbones.save_checkpoint(model, path.with_suffix(".safetensors"))
    assert backbones.create_model("convnext_atto", checkpoint_path=own).num_classes == 10


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18"])
@pytest.mark.parametrize("form", ["other width", "none"])
def test_a_new_classifier_is_asked_for_and_said(name, form, tmp_path, caplog):
    model = backbones.create_model(name, num_classes=7)
    state = model.state_dict()
    classifier = "fc" if name == "resnet18" else "head.fc"
    if form == "none":
        state = {key: value for key, value in state.items() if not key.startswith(classifier)}
    path = tmp_path / "m.pth"
    torch.save(state, path)
    with caplog.at_level(logging.WARNING):
        made = backbones.create_model(name, num_classes=3, checkpoint_path=path)
    assert made.num_classes == 3
    first = next(iter(state))
    assert torch.equal(made.state_dict()[first], state[first])
    assert f"new classifier ({classifier}.weight, {classifier}.bias)" in caplog.text
    report = backbones.factory.open_checkpoint(path, name, num_classes=3).report
    assert report.new == (f"{classifier}.weight", f"{classifier}.bias")
    assert f"new 2: {classifier}.weight" in str(report)
    caplog.clear()
    if form == "none":
        with pytest.raises(CheckpointError, match="classifier"):
            backbones.create_model(name, checkpoint_path=path)
    else:
        backbones.create_model(name, num_classes=7, checkpoint_path=path)
    assert not caplog.text


def test_half_a_classifier_is_none(tmp_path, caplog):
    state = backbones.create_model("convnext_atto", num_classes=3, **SMALL).state_dict()
    del state["head.fc.bias"]
    torch.save(state, tmp_path / "m.pth")
    for make in (
        backbones.load_model,
        lambda path, name, **more: backbones.create_model(name, checkpoint_path=path, **more),
    ):
        with pytest.raises(CheckpointError, match=r"head\.fc\.bias"):
            make(tmp_path / "m.pth", "convnext_atto", **SMALL)
    made = backbones.create_model(
        "convnext_atto", num_classes=3, checkpoint_path=tmp_path / "m.pth", **SMALL
    )
    assert not torch.equal(made.head.fc.weight, state["head.fc.weight"])
    assert "new classifier" in caplog.text


# Files that name their model.


@pytest.mark.parametrize(
    "facts",
    [
        {"arch": "convnext_atto"},
        {"args": argparse.Namespace(model="convnext_atto.d2_in1k", lr=0.1)},
        {"arch": "convnext", "args": argparse.Namespace(model="convnext_atto")},
        {"args": {"arch": "convnext_atto"}},
        {"hyper_parameters": {"model_name": "convnext_atto"}},
    ],
)
def test_a_training_script_names_its_model(facts, trained, tmp_path):
    _, model = trained
    path = tmp_path / "checkpoint-9.pth.tar"
    torch.save({"epoch": 9, "state_dict": model.state_dict(), **facts}, path)
    loaded = backbones.load_model(path)
    assert loaded.config["name"] == "convnext_atto"
    assert torch.equal(loaded.head.fc.weight, model.head.fc.weight)


def test_a_name_in_a_file_is_a_name_and_no_path(trained, tmp_path):
    """A stranger's file must not make anything be read or fetched."""
    _, model = trained
    (tmp_path / "mine.yaml").write_text(
        "family: convnext\nvariants:\n  mine:\n    like: convnext_atto\n"
    )
    path = tmp_path / "m.pth"
    for name in (str(tmp_path / "mine.yaml"), "hf-hub:a/b", "local-dir:/etc", "my_net"):
        torch.save({"state_dict": model.state_dict(), "arch": name}, path)
        with pytest.raises(ConfigError, match="does not say which model it is of .only '"):
            backbones.load_model(path)


# Layouts and folders of others.


@torch.no_grad()
def test_torchvisions_convnext():
    torchvision = pytest.importorskip("torchvision")
    setting = torchvision.models.convnext.CNBlockConfig
    widths, depths = [8, 16, 24, 32], [1, 2, 3, 1]
    theirs = torchvision.models.ConvNeXt(
        [setting(a, b, n) for a, b, n in zip(widths, [*widths[1:], None], depths)],
        layer_scale=0.5,
        num_classes=6,
    )
    theirs = theirs.double().eval()
    for index, value in enumerate(theirs.parameters()):
        nn.init.normal_(value, std=0.3, generator=torch.Generator().manual_seed(index))
    ours = backbones.create_model(
        "convnext_tiny", depths=depths, dims=widths, num_classes=6, dtype=torch.float64
    ).eval()
    report = load_checkpoint(ours, theirs.state_dict())
    assert report.layout == "torchvision"
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_torchvisions_convnext_in_every_size(size):
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"convnext_{size}")(weights=None)
    ours = backbones.create_model(f"convnext_{size}", device="meta")
    mapped = backbones.weights.map_checkpoint(theirs.state_dict(), ours)
    assert (mapped.layout, len(mapped.tensors)) == ("torchvision", len(ours.state_dict()))


def wrapper_folder(folder, architecture, state, **fields):
    """What transformers' TimmWrapper saves."""
    folder.mkdir()
    content = {
        "architecture": architecture,
        "architectures": ["TimmWrapperForImageClassification"],
        "model_args": None,
        "model_type": "timm_wrapper",
        **fields,
    }
    (folder / "config.json").write_text(json.dumps(content))
    safetensors.torch.save_file(under("timm_model.", state), folder / "model.safetensors")
    return f"local-dir:{folder}"


@pytest.mark.parametrize(
    ("architecture", "folder"),
    [("resnet18", "plain"), *(("convnext_atto", name) for name in ("plain", *ODD_NAMES))],
)
@torch.no_grad()
def test_a_folder_of_transformers(architecture, folder, tmp_path):
    theirs = timm.create_model(architecture, num_classes=7).eval()
    place = wrapper_folder(tmp_path / folder, architecture, theirs.state_dict(), num_classes=7)
    ours = backbones.create_model(place, pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert backbones.create_model(place, num_classes=2).num_classes == 2


def test_a_folder_of_transformers_as_transformers_writes_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmWrapperConfig(architecture="convnext_atto", num_labels=5)
    theirs = transformers.TimmWrapperForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path / "saved")
    ours = backbones.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-4, atol=1e-5)
    assert (
        backbones.load_model(tmp_path / "saved/model.safetensors", "convnext_atto").num_classes == 5
    )


@pytest.mark.parametrize("content", [{"model_type": "convnext"}, {"architecture": 3}, [], {}])
def test_a_folder_that_names_no_architecture(content, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"names no 'architecture'.*load_model\("):
        backbones.create_model(f"local-dir:{tmp_path}")


def test_a_folder_whose_architecture_is_unknown(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "my_net"}))
    with pytest.raises(BackbonesError, match="no model 'my_net'"):
        backbones.create_model(f"local-dir:{tmp_path}")


# Odd names of folders.


@pytest.mark.parametrize("folder", ODD_NAMES)
def test_odd_folders_hold_yaml_files_and_checkpoints(folder, tmp_path, monkeypatch):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "tiny.yaml").write_text(
        "family: convnext\nvariants:\n  tiny:\n    like: convnext_atto\n    depths: [1, 1, 1, 1]\n"
        "  other:\n    like: tiny\n    dims: [8, 16, 24, 32]\n"
    )
    monkeypatch.chdir(tmp_path)
    for start in (".", tmp_path):
        model = backbones.create_model(f"{start}/{folder}/tiny.yaml#other")
        assert model.config["name"] == "other"
        with pytest.raises(ConfigError, match=r"several variants; name one as .*tiny.yaml#NAME"):
            backbones.create_model(f"{start}/{folder}/tiny.yaml")
    path = backbones.save_checkpoint(model, tmp_path / folder / "m.safetensors")
    assert backbones.load_model(path).config["name"] == "other"
    assert backbones.create_model(f"./{folder}/tiny.yaml#other", checkpoint_path=path)
    torch.save(model.state_dict(), tmp_path / folder / "m.pth")
    assert backbones.load_model(f"{folder}/m.pth", f"./{folder}/tiny.yaml#other")
