"""Validation: figures, tables, and which class is which."""

import csv
import json
import shutil

import pytest
import torch
from patterns import short_run, write_patterns
from timm.data import resolve_model_data_config

import backbones
from backbones import train
from backbones.cli import main
from backbones.train import DataError, set_input, validate, write_validation
from backbones.train.validation import RESULTS


@pytest.fixture(scope="module")
def checkpoint(images, tmp_path_factory):

    options = {**short_run(images, tmp_path_factory.mktemp("run")), "epochs": 4}
    return train.run(**options).folder / "model_best.safetensors"


def test_figures_and_files_agree_with_what_the_model_says(images, checkpoint, tmp_path, capsys):
    # A wrong label, so that there is something off the diagonal.
    root = tmp_path / "images"
    shutil.copytree(images, root)
    shutil.move(root / "val" / "west" / "00.png", root / "val" / "east" / "99.png")
    argv = ["validate", str(checkpoint), "--data-dir", str(root)]
    assert main([*argv, "--output", str(tmp_path / "out"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(RESULTS)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["top1"] == figures["top1"]

    model = backbones.create_model("convnext_atto", checkpoint_path=checkpoint).eval()
    saved = backbones.weights.read_metadata(checkpoint)["backbones"]
    model.pretrained_cfg.update(saved["input"])
    result = validate(
        model, root, resolve_model_data_config(model), classes=saved["classes"], batch_size=5
    )
    assert result.evaluation.top1 == figures["top1"] < 100
    assert figures["images"] == 16
    confusion = result.confusion
    assert confusion.sum() == 16
    east, west = saved["classes"].index("east"), saved["classes"].index("west")
    assert confusion[east, west] >= 1
    assert confusion.sum(dim=1)[east] == 5
    assert 100 * confusion.diagonal().sum() / 16 == pytest.approx(figures["top1"])
    with (tmp_path / "out" / "confusion.csv").open() as stream:
        rows = list(csv.reader(stream))
    assert rows[0][1:] == saved["classes"]
    assert [[int(n) for n in row[1:]] for row in rows[1:]] == confusion.tolist()
    with (tmp_path / "out" / "per_class.csv").open() as stream:
        table = {row["class"]: row for row in csv.DictReader(stream)}
    assert int(table["east"]["images"]) == 5
    assert float(table["east"]["accuracy"]) == figures["per_class"][east]["accuracy"]


def test_reparameterized_and_exported_the_same_images_give_the_same(
    images, checkpoint, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("onnxruntime")
    seen = []
    monkeypatch.setattr(
        "backbones.cli.validate.validate",
        lambda model, *rest, **options: seen.append(model) or validate(model, *rest, **options),
    )
    model = backbones.load_model(checkpoint)
    classes = model.pretrained_cfg["label_names"]
    backbones.export(model, tmp_path / "model.onnx", classes=classes)

    def top1(*argv):
        assert main(["validate", *map(str, argv), "--data-dir", str(images), "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        return figures["top1"], pytest.approx(figures["loss"], rel=1e-4)

    plain = top1(checkpoint)
    assert top1(checkpoint, "--reparam") == plain
    assert top1(tmp_path / "model.onnx") == plain
    assert [getattr(model, "deployed", None) for model in seen] == [False, True, None]
    argv = ["validate", str(tmp_path / "model.onnx"), str(images)]
    assert main([*argv, "--reparam"]) == 2
    assert "is exported and says itself" in capsys.readouterr().err


def test_people_read_accuracy_and_the_worst_classes(images, checkpoint, capsys):
    assert main(["validate", str(checkpoint), str(images)]) == 0
    out = capsys.readouterr().out
    assert "of 16 right" in out
    assert out.count("(") == 4


def test_fewer_classes_than_the_model_knows(images, checkpoint, tmp_path, capsys):
    root = tmp_path / "some"
    for name in ("south", "west"):
        shutil.copytree(images / "val" / name, root / name)
    argv = ["validate", str(checkpoint), "--data-dir", str(root), "--json"]
    assert main(argv) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["images"] == 8
    assert figures["top1"] == 100
    assert [row["accuracy"] for row in figures["per_class"]] == [None, None, 100, 100]
    (root / "south").rename(root / "sud")
    assert main(argv) == 2
    assert "classes that training does not have: sud" in capsys.readouterr().err


def test_without_class_names_the_count_must_fit(images):
    torch.manual_seed(0)
    model = backbones.create_model("convnext_atto", num_classes=9)
    set_input(model, 32)
    with pytest.raises(DataError, match="holds 4 classes, the model knows 9"):
        validate(model, images, resolve_model_data_config(model), num_classes=9)


def test_imagenet_models_know_the_folders_of_imagenet(tmp_path):
    root = write_patterns(tmp_path, counts=[("val", 2)], classes=["n01440764", "n02102040"])
    model = backbones.create_model("convnext_atto.d2_in1k")
    set_input(model, 32)
    result = validate(model, root, resolve_model_data_config(model), num_classes=1000)
    assert len(result.classes) == 1000
    assert result.evaluation.targets.tolist() == [0, 0, 217, 217]  # tench, English springer


def test_bad_images(images, checkpoint, tmp_path, capsys):
    root = tmp_path / "images"
    shutil.copytree(images, root)
    bad = root / "val" / "west" / "00.png"
    bad.write_bytes(b"nothing")
    argv = ["validate", str(checkpoint), "--data-dir", str(root)]
    assert main(argv) == 2
    assert str(bad) in capsys.readouterr().err
    assert main([*argv, "--skip-bad"]) == 0
    out = capsys.readouterr().out
    assert "of 15 right" in out
    assert f"left out: {bad}" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["validate", "convnext_atto"], "name the folder"),
        (["validate", "nothing.safetensors", "nowhere"], "no such file"),
        (["validate", "nothing.onnx", "nowhere"], "no such file"),
    ],
)
def test_what_is_missing_is_named(argv, words, capsys):
    assert main(argv) in (1, 2)
    assert words in capsys.readouterr().err


def test_results_are_written_anew(images, checkpoint, tmp_path):
    model = backbones.load_model(checkpoint)
    classes = model.pretrained_cfg["label_names"]
    result = validate(model, images, resolve_model_data_config(model), classes=classes)
    for _ in range(2):
        assert [path.name for path in write_validation(result, tmp_path)] == list(RESULTS)
