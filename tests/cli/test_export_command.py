"""``backbones export``, and what takes its files."""

import json
import shutil

import pytest
import torch
from PIL import Image
from torch import nn

import backbones
from backbones.cli import main
from backbones.engines import file_suffixes, open_exported
from backbones.train import set_input

pytest.importorskip("onnxruntime")
CLASSES = ["ant", "bee", "cat"]
SHAPE = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = backbones.create_model("convnext_atto", num_classes=3, **SHAPE)
    nn.init.normal_(model.get_classifier().weight)
    set_input(model, 48)
    path = tmp_path_factory.mktemp("checkpoint") / "m.safetensors"
    backbones.save_checkpoint(model, path, classes=CLASSES)
    return model.eval(), str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name in CLASSES:
        (root / name).mkdir()
        for i in range(4):
            Image.effect_noise((70, 60), 60 + 20 * i).convert("RGB").save(root / name / f"{i}.png")
    return str(root)


def test_a_checkpoint_becomes_a_file_that_knows_its_classes(checkpoint, tmp_path, capsys):
    model, source = checkpoint
    target = tmp_path / "m.onnx"
    assert main(["export", source, str(target)]) == 0
    out = capsys.readouterr().out
    assert f"wrote {target}: onnx in fp32, input 3x48x48" in out
    assert "onnxruntime on random images 5x3x48x48: largest error" in out
    runner = open_exported(target)
    assert runner.metadata["classes"] == CLASSES
    assert runner.metadata["provenance"] == {"checkpoint": "m.safetensors"}
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(runner(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_the_report_for_programs(checkpoint, folder, tmp_path, capsys, suffix):
    pytest.importorskip("nncf" if suffix == ".xml" else "onnxruntime")
    _, source = checkpoint
    target = str(tmp_path / f"m{suffix}")
    options = ["--precision", "int8", "--calibration", folder, "--img-size", "64", "32", "--json"]
    assert main(["export", source, target, *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == target
    assert report["precision"] == "int8"
    assert report["input_size"] == [3, 64, 32]
    assert [check["real"] for check in report["checks"]] == [True]
    assert report["checks"][0]["shape"] == [12, 3, 64, 32]
    found = report["checks"][0]["agreement"]  # the folders of the images are classes
    for file, share in ((target, found["top1"]), (source, found["reference_top1"])):
        size = ["--img-size", "64", "32"] if file == source else []
        assert main(["validate", file, "--data-dir", folder, *size, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(100 * share)


def test_accuracy_is_told_where_every_folder_is_a_class(checkpoint, folder, tmp_path, capsys):
    _, source = checkpoint
    target = str(tmp_path / "m.onnx")
    options = ["--batch", "2", "--preprocess", "--calibration"]
    assert main(["export", source, target, *options, folder]) == 0
    assert "% right (model: " in capsys.readouterr().out
    shutil.copytree(folder, tmp_path / "more")
    (tmp_path / "more" / "cat").rename(tmp_path / "more" / "dog")
    assert main(["export", source, target, *options, str(tmp_path / "more")]) == 0
    assert "% right" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".pt2"])
def test_an_exported_file_is_validated_like_the_checkpoint(
    checkpoint, folder, tmp_path, capsys, suffix
):
    pytest.importorskip("openvino" if suffix == ".xml" else "torch")
    _, source = checkpoint
    target = str(tmp_path / f"m{suffix}")
    assert main(["export", source, target]) == 0
    capsys.readouterr()
    results = []
    for file in (source, target):
        assert main(["validate", file, "--data-dir", folder, "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["top1"] == results[1]["top1"]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-4)


def test_features_and_raw_images(checkpoint, tmp_path, capsys):
    _, source = checkpoint
    target = str(tmp_path / "m.onnx")
    assert main(["export", source, target, "--features", "--preprocess"]) == 0
    maps = open_exported(target)(torch.zeros(1, 80, 100, 3, dtype=torch.uint8))
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 12, 12), (16, 6, 6), (24, 3, 3), (32, 1, 1)]


def test_a_name_needs_weights_unless_random_ones_will_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    target = str(tmp_path / "m.pt2")
    assert main(["export", "cpubone_nano", target, "--img-size", "32", "--random"]) == 0
    assert open_exported(target).metadata["name"] == "cpubone_nano"


@pytest.mark.parametrize(
    "options, message",
    [
        (["m.txt"], "the suffix names no format"),
        (["m.onnx", "--precision", "int4"], "no precision 'int4'"),
        (["m.onnx", "--precision", "int8"], "needs images to calibrate on"),
        (["m.onnx", "--dynamic", "depth"], "no dynamic dimension 'depth'"),
        (["m.tflite", "--dynamic", "height"], "'height' cannot stay free"),
        (["m.onnx", "--max-size", "96"], "--max-size: ExecuTorch files alone have it"),
        (["m.onnx", "--img-size", "1", "2", "3"], "one or two numbers"),
        (["none/m.onnx"], "a folder that exists"),
    ],
)
def test_bad_input_exits_with_2_and_leaves_nothing(checkpoint, tmp_path, capsys, options, message):
    _, source = checkpoint
    assert main(["export", source, str(tmp_path / options[0]), *options[1:]]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint_is_named(tmp_path, capsys):
    assert main(["export", str(tmp_path / "none.safetensors"), str(tmp_path / "m.onnx")]) == 2
    assert "none.safetensors: no such file" in capsys.readouterr().err


def test_the_help_names_every_suffix(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    text = capsys.readouterr().out
    assert "example: backbones export" in text
    assert all(suffix in text for suffix in file_suffixes())
