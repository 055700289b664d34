"""Preprocessing within the file equals timm's transform by Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from backbones.engines import export, open_exported
from backbones.engines.preparation import Preprocessed
from backbones.errors import ConfigError, UnsupportedError

datasets = pytest.importorskip("sklearn.datasets")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONFIG = {"mean": MEAN, "std": STD, "input_size": (3, 224, 224), "crop_pct": 0.875}


class Same(nn.Module):
    def forward(self, x):
        return x


def photo(height=None, width=None):
    return datasets.load_sample_image("china.jpg")[:height, :width].copy()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"crop_pct": 1.0},
        {"input_size": (3, 288, 288), "crop_pct": 0.95},
        {"input_size": (3, 96, 160)},
        {"crop_mode": "squash"},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(427, 640), (301, 200), (100, 77)], ids=str)
def test_pixels_are_those_of_timm(interpolation, change, shape):
    config = {**CONFIG, "interpolation": interpolation, **change}
    image = photo(*shape)
    expected = create_transform(**config)(Image.fromarray(image))[None]
    found = Preprocessed(Same(), config)(torch.from_numpy(image)[None])
    assert found.shape == expected.shape
    levels = (found - expected).abs() * torch.tensor(STD).reshape(1, 3, 1, 1) * 255
    # Pillow rounds to whole levels twice.
    assert float(levels.mean()) < 0.35
    mixed = config.get("crop_mode") == "squash" and shape == (301, 200)
    # Where one side shrinks and the other grows, Pillow 13 resizes columns first, and overshoots
    # of the bicubic filter are cut off in that order.
    assert float(levels.max()) < (6 if mixed else 1.2)


def test_a_file_takes_photos_of_all_sizes(tmp_path):
    pytest.importorskip("onnxruntime")
    model = small()
    path = tmp_path / "m.onnx"
    report = export(model, path, input_size=(3, 64, 64), preprocess=True)
    assert report.dynamic == ("batch", "height", "width")
    runner = open_exported(path)
    assert runner.raw
    assert runner.metadata["preprocess"] is True
    data_config = {**resolve_model_data_config(model), "input_size": (3, 64, 64)}
    transform = create_transform(**data_config)
    for image in (photo(), photo(200, 333)):
        with torch.no_grad():
            expected = model(transform(Image.fromarray(image))[None])
        found = runner(image[None])
        assert isinstance(found, np.ndarray)
        # the rounding of gray levels again
        assert np.abs(found - expected.numpy()).max() < 0.02 * float(expected.abs().max())
    with pytest.raises(ConfigError, match="takes uint8 images, got torch.float32"):
        runner(torch.zeros(1, 64, 64, 3))


def test_a_file_without_it_refuses_raw_images(tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "m.onnx"
    export(small(), path, input_size=(3, 64, 64))
    with pytest.raises(ConfigError, match="takes normalized floating-point images"):
        open_exported(path)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_what_has_no_matrix_is_refused():
    with pytest.raises(UnsupportedError, match="interpolation 'lanczos'"):
        Preprocessed(Same(), {**CONFIG, "interpolation": "lanczos"})
    with pytest.raises(UnsupportedError, match="crop_mode 'border'"):
        Preprocessed(Same(), {**CONFIG, "interpolation": "bilinear", "crop_mode": "border"})
