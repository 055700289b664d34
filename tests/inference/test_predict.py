"""Rows of predictions and embeddings: the model's own, in order, whatever the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from collections_of_images import CLASSES, picture, small_model, write_pictures
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import backbones
import backbones.inference
from backbones.engines import Setting, available_engines, deploy_for_throughput
from backbones.errors import ConfigError, DataError, UnsupportedError


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    return folder, write_pictures(folder, 13)


def by_hand(model, paths, mode="RGB"):
    """Logits by timm's own transform, an image at a time."""
    transform = create_transform(**resolve_model_data_config(model))
    with torch.no_grad():
        return torch.cat([model(transform(Image.open(p).convert(mode))[None]) for p in paths])


@pytest.mark.parametrize("batch_size", [None, 1, 4, 20])
def test_rows_are_the_models(model, photos, batch_size):
    folder, paths = photos
    expected = by_hand(model, paths).softmax(1)
    assert len(set(expected.argmax(1).tolist())) > 1
    rows = list(backbones.predict(folder, model, top_k=2, classes=CLASSES, batch_size=batch_size))
    assert [row.path for row in rows] == [str(path) for path in paths]
    top = expected.topk(2)
    for row, values, indices in zip(rows, top.values.tolist(), top.indices.tolist()):
        assert [one.index for one in row.predictions] == indices
        assert [one.name for one in row.predictions] == [CLASSES[i] for i in indices]
        found = [one.probability for one in row.predictions]
        assert found == pytest.approx(values, rel=1e-4)


def test_embeddings_are_what_enters_the_classifier(model, photos):
    folder, paths = photos
    transform = create_transform(**resolve_model_data_config(model))
    x = torch.stack([transform(Image.open(path)) for path in paths])
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True).numpy()
    for options in ({}, {"engine": "onnxruntime"}):
        rows = list(backbones.embed(folder, model, **options))
        found = np.stack([row.embedding for row in rows])
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert model.num_classes == len(CLASSES)  # the model itself keeps its classifier


def test_no_embeddings_of_what_has_none(model, photos, tmp_path):
    with pytest.raises(UnsupportedError, match="re-parameterized"):
        backbones.embed(photos[0], backbones.reparameterize(model))
    backbones.export(model, tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match="logits, not embeddings"):
        backbones.embed(photos[0], tmp_path / "m.onnx")


@pytest.mark.parametrize("engine", [one for one in available_engines() if one != "compile"])
def test_engines_agree(model, photos, engine, tmp_path):
    folder, paths = photos
    expected = by_hand(model, paths).argmax(1).tolist()
    rows = list(backbones.predict(folder, model, engine=engine, threads=2, cache_dir=tmp_path))
    assert [row.predictions[0].index for row in rows] == expected


@pytest.mark.parametrize("preprocess", [False, True])
def test_exported_files(model, photos, tmp_path, preprocess):
    folder, paths = photos
    path = tmp_path / "m.onnx"
    backbones.export(model, path, preprocess=preprocess)
    rows = list(backbones.predict(folder, path))
    assert [row.predictions[0].index for row in rows] == by_hand(model, paths).argmax(1).tolist()
    with pytest.raises(ConfigError, match="leave these options out"):
        backbones.predict(folder, path, engine="openvino")


@pytest.mark.parametrize("engine", ["eager", "openvino"])
def test_a_deployed_model(photos, tmp_path, engine):
    folder, paths = photos
    named = small_model()
    named.pretrained_cfg["label_names"] = CLASSES
    runner = backbones.deploy(named, engine=engine, cache_dir=tmp_path)
    rows = list(backbones.predict(folder, runner))
    expected = [CLASSES[i] for i in by_hand(named, paths).argmax(1)]
    assert [row.predictions[0].name for row in rows] == expected


def test_a_file_for_one_image_a_call(model, photos, tmp_path):
    backbones.export(model, tmp_path / "m.onnx", dynamic=())
    rows = list(backbones.predict(photos[0], tmp_path / "m.onnx"))
    assert [r.predictions[0].index for r in rows] == by_hand(model, photos[1]).argmax(1).tolist()


@pytest.mark.parametrize("channels, mode", [(1, "L"), (4, "RGBA")])
def test_channels(tmp_path, channels, mode):
    model = small_model(channels)
    paths = write_pictures(tmp_path, 5, mode=mode)
    rows = list(backbones.predict(tmp_path, model))
    expected = by_hand(model, paths, mode).argmax(1).tolist()
    assert [row.predictions[0].index for row in rows] == expected


def test_damaged_images_are_rows(model, photos, tmp_path):
    good = write_pictures(tmp_path, 6)
    good[2].write_bytes(good[2].read_bytes()[:60])
    rows = list(backbones.predict(tmp_path, model, batch_size=4))
    assert [row.error is None for row in rows] == [i != 2 for i in range(6)]
    assert str(good[2]) in rows[2].error
    assert rows[2].predictions == ()
    expected = by_hand(model, [path for path in good if path != good[2]]).argmax(1).tolist()
    assert [row.predictions[0].index for row in rows if row.error is None] == expected
    with pytest.raises(DataError, match="2"):
        list(backbones.predict(tmp_path, model, strict=True))


def test_streams_are_taken_as_they_come(model):
    """However many images there are, only a few are taken ahead of the rows."""
    taken = 0

    def images():
        nonlocal taken
        for i in range(10_000):
            taken += 1
            yield picture(i)

    setting = {"engine": "eager", "batch_size": 2, "threads": 1}
    rows = backbones.predict(images(), model, **setting)
    first = [next(rows) for _ in range(3)]
    assert [row.path for row in first] == ["0", "1", "2"]
    assert taken < 40
    rows.close()


def test_reduced_decoding_is_nearly_the_same(model, tmp_path):
    small = write_pictures(tmp_path / "small", 4, ".jpg")
    large = write_pictures(tmp_path / "large", 4, ".jpg", size=(640, 880))
    for folder, error in ((tmp_path / "small", 0), (tmp_path / "large", 0.1)):
        exact, fast = (
            [row.predictions[0].probability for row in backbones.predict(folder, model, reduce=r)]
            for r in (False, True)
        )
        assert np.abs(np.subtract(exact, fast)).max() <= error
    assert Image.open(large[0]).size == (880, 640)
    item = backbones.inference.open_source(large[0])[0]
    assert item.open("RGB", reduce_to=(80, 80)).size == (110, 80)
    assert len(small) == 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"classes": ["one"]}, "1 names of classes, and the model has 4"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"precision": "fp64"}, "no precision 'fp64'"),
        ({"precision": "int8"}, "needs real images"),
    ],
)
def test_wrong_options(model, photos, options, message):
    with pytest.raises(ConfigError, match=message):
        list(backbones.predict(photos[0], model, **options))


def test_the_setting_is_measured_and_remembered(model, tmp_path):
    lines: list[str] = []
    options = {"engine": "onnxruntime", "threads": 2, "cache_dir": tmp_path}
    found = deploy_for_throughput(model, **options, progress=lines.append)
    assert found.setting.images_per_second > 0
    assert found.setting.streams * found.setting.threads == 2
    assert any("2 x 1 threads" in line for line in lines)
    lines.clear()
    again = deploy_for_throughput(model, **options, progress=lines.append)
    assert again.setting == found.setting
    assert not lines
    told = Setting("onnxruntime", "fp32", 3, 1, 1)
    assert deploy_for_throughput(model, setting=told, cache_dir=tmp_path).setting == told
