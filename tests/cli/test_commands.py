"""The quick commands, in this process: what they print, and their exit codes."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import backbones
from backbones.cli import main
from backbones.train import set_input

CLASSES = ["ant", "bee", "cat"]
SHAPE = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "a.png"
    Image.effect_noise((80, 60), 90).convert("RGB").save(path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = backbones.create_model("convnext_atto", num_classes=3, **SHAPE)
    torch.nn.init.normal_(model.get_classifier().weight)
    set_input(model, 48)
    path = tmp_path_factory.mktemp("checkpoint") / "m.safetensors"
    backbones.save_checkpoint(model, path, classes=CLASSES)
    return model.eval(), str(path)


def fails(capsys, code, *argv):
    """Run a command that must fail with one message and print nothing else; return the message."""
    assert main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("command", ["list", "info", "predict", "quickstart"])
def test_help_shows_an_example(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"example: backbones {command}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["lst"], ["info"], ["predict"], ["list", "--top-k", "1"]])
def test_wrong_usage_exits_with_2(capsys, argv):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert "usage: backbones" in capsys.readouterr().err


def test_list_is_what_the_api_lists(capsys):
    assert main(["list"]) == 0
    assert capsys.readouterr().out.splitlines() == backbones.list_models()
    assert main(["list", "convnext_*", "--family", "convnext", "--json"]) == 0
    expected = backbones.list_models("convnext_*", family="convnext")
    assert json.loads(capsys.readouterr().out) == expected
    assert main(["list", "--pretrained"]) == 0
    assert capsys.readouterr().out.splitlines() == backbones.list_models(pretrained=True)
    assert main(["list", "--license", "cc-by-nc-4.0"]) == 0
    assert capsys.readouterr().out.splitlines() == backbones.list_models(license="cc-by-nc-4.0")


def test_list_says_when_nothing_matches(capsys):
    assert main(["list", "nothing*", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out) == []
    assert "no model matches" in captured.err
    assert "did you mean 'convnext'" in fails(capsys, 2, "list", "--family", "convnxt")


def test_info_describes(capsys):
    assert main(["info", "convnext_tiny"]) == 0
    text = capsys.readouterr().out
    assert "28.59 M" in text
    assert "arxiv.org/abs/2201.03545" in text
    info = backbones.model_info("convnext_tiny")
    assert all(tag in text for tag in info.tags)
    assert main(["info", "convnext_tiny", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["params"] == info.params
    assert facts["weights"][0]["license"] == info.weights[0].license


def test_info_of_what_is_not_there(capsys):
    message = fails(capsys, 2, "info", "convnxt_tiny")
    assert "convnext_tiny" in message
    assert "fb_in1k" in fails(capsys, 2, "info", "convnext_tiny.fb_in1")


def test_predict_needs_nothing_but_the_checkpoint(capsys, image, checkpoint):
    model, path = checkpoint
    assert main(["predict", path, image, "--json", "--top-k", "2"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    transform = create_transform(**resolve_model_data_config(model))
    with torch.no_grad():
        expected = model(transform(Image.open(image))[None]).softmax(1)[0]
    assert expected.max() > 0.4  # far from even, so that a wrong model or input would show
    top = expected.topk(2)
    assert answer["path"] == image
    assert [guess["class"] for guess in answer["predictions"]] == [CLASSES[i] for i in top.indices]
    found = [guess["probability"] for guess in answer["predictions"]]
    assert found == pytest.approx(top.values.tolist(), rel=1e-4)


def test_predict_prints_for_people(capsys, image, checkpoint):
    assert main(["predict", checkpoint[1], image, image]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert lines[0] == lines[4] == image
    assert "%" in lines[1]
    assert lines[1].split()[-1] in CLASSES


def test_predict_names_imagenet_classes(capsys, image, tmp_path):
    model = backbones.create_model("convnext_atto", **SHAPE)
    with torch.no_grad():
        model.get_classifier().bias[7] = 50.0
    # A plain file says nothing of itself, so the model has to be named, here in a YAML file.
    torch.save(model.state_dict(), tmp_path / "m.pt")
    (tmp_path / "m.yaml").write_text(
        "family: convnext\nvariants:\n  mine:\n    like: convnext_atto\n"
        "    depths: [1, 1, 1, 1]\n    dims: [8, 16, 24, 32]\n"
    )
    argv = ["predict", str(tmp_path / "m.pt"), image, "--top-k", "1"]
    assert "add --name" in fails(capsys, 2, *argv)
    assert main([*argv, "--name", str(tmp_path / "m.yaml")]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["100.00%", "cock"]


def test_predict_names_every_bad_image(capsys, image, checkpoint, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(image).read_bytes()[:2000])
    gone = [str(tmp_path / "nothing.png"), str(tmp_path / "nor.png")]
    message = fails(capsys, 2, "predict", checkpoint[1], gone[0], image, gone[1])
    assert all(name in message for name in gone)
    assert image not in message
    bad = [str(tmp_path / "text.jpg"), str(cut)]
    message = fails(capsys, 2, "predict", checkpoint[1], *bad)
    assert all(name in message for name in bad)
    assert main(["predict", checkpoint[1], bad[0], image, bad[1]]) == 2  # the good one is named
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == image
    assert all(f"error: {name}" in captured.err for name in bad)


def test_predict_with_bad_checkpoints(capsys, image, checkpoint, tmp_path):
    message = fails(capsys, 2, "predict", str(tmp_path / "no.safetensors"), image)
    assert "no.safetensors: no such file" in message
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(checkpoint[1]).read_bytes()[:5000])
    for named in ([], ["--name", "convnext_atto"]):
        message = fails(capsys, 2, "predict", str(cut), image, *named)
        assert "cut.safetensors: cut short" in message
    no_file = tmp_path / "text.safetensors"
    no_file.write_text("hello")
    message = fails(capsys, 2, "predict", str(no_file), image)
    assert "neither safetensors nor a file of torch.save" in message
    other = ["predict", checkpoint[1], image, "--name", "convnext_tiny"]
    assert "m.safetensors" in fails(capsys, 2, *other)


def test_predict_without_a_network_says_so(capsys, image, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "convnext_atto" in fails(capsys, 1, "predict", "convnext_atto", image)
    assert "no model" in fails(capsys, 2, "predict", "convnext_attto", image)


def test_quickstart_refuses_before_it_writes(capsys, tmp_path):
    output = tmp_path / "out"
    quickstart = ["quickstart", "--output", str(output)]
    assert "smaller than" in fails(capsys, 2, *quickstart, "--size", "16")
    assert "no model" in fails(capsys, 2, *quickstart, "--model", "convnext_attto")
    assert "lr must be" in fails(capsys, 2, *quickstart, "--lr", "0")
    assert not output.exists()
    output.write_text("a file")
    assert "is a file" in fails(capsys, 2, *quickstart)
    assert output.read_text() == "a file"
