"""Preprocessing within the file equals timm's transform by Pillow."""

import numpy as np
import pytest
import torch
from file_checks import INT8_SUFFIXES, skip_without_packages
from PIL import Image
from small_models import small
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from backbones.engines import OnnxConfig, compare, export, open_exported
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


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of photographs, no two of one size, one of them gray."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(5):
        Image.fromarray(photo(200 + 50 * i, 333 - 31 * i)).save(folder / f"{i}.png")
    Image.fromarray(photo()).convert("L").save(folder / "gray.jpg")
    return folder


@pytest.fixture(params=INT8_SUFFIXES)
def suffix(request):
    skip_without_packages(request.param)
    return request.param


def test_photographs_are_compared_as_they_are(photos, suffix, tmp_path):
    path = tmp_path / f"m{suffix}"
    report = export(small(), path, input_size=(3, 64, 64), preprocess=True, calibration=photos)
    *drawn, own = report.checks
    assert len(drawn) >= 2 and not any(check.real for check in drawn)
    assert own.real and own.agreement.count == 6 and own.agreement.relative_error < 1e-4
    if suffix == ".pte":  # for one size
        assert own.shape == (6, 64, 64, 3) and "real images 6x64x64x3" in str(report)
    else:
        assert own.shape == (6, None, None, 3) and "real images 6x?x?x3" in str(report)


@pytest.mark.parametrize(
    "kind", ["photographs", pytest.param("normalized", marks=pytest.mark.slow)]
)
def test_int8_leaves_the_preprocessing_exact(kind, photos, suffix, tmp_path):
    """The file computes what the int8 file without preprocessing does of normalized images."""
    model, options = small(), {"input_size": (3, 64, 64), "precision": "int8"}
    options["calibration"] = photos
    if kind == "normalized":
        options["calibration"] = torch.randn(40, 3, 64, 64).clamp(-2, 2)
    report = export(model, tmp_path / f"m{suffix}", preprocess=True, **options)
    export(model, tmp_path / f"plain{suffix}", **options)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{stem}{end}" for stem in ("m", "plain") for end in (suffix, ".bin")} - (
        set() if suffix == ".xml" else {"m.bin", "plain.bin"}
    )
    (check,) = report.checks
    assert check.real and check.agreement.count == (6 if kind == "photographs" else 40)
    # A file of one size gets photographs squashed to it, unlike those that it is calibrated on.
    assert 1e-3 < check.agreement.relative_error < (0.5 if suffix == ".pte" else 0.2)
    whole, plain = open_exported(report.path), open_exported(tmp_path / f"plain{suffix}")
    assert whole.raw and whole.precision == "int8" and whole.metadata["preprocess"] is True
    config = {**resolve_model_data_config(model), "input_size": (3, 64, 64)}
    shapes = ((64, 64),) if suffix == ".pte" else ((64, 64), (427, 640), (30, 50))
    for height, width in shapes:
        image = torch.from_numpy(photo(height, width))[None]
        expected = plain(Preprocessed(nn.Identity(), config)(image))
        assert compare(expected, whole(image)).relative_error < 5e-3


def test_a_fixed_number_of_photographs(photos, tmp_path):
    pytest.importorskip("onnxruntime")
    options = {"input_size": (3, 64, 64), "preprocess": True, "calibration": photos}
    report = export(small(), tmp_path / "m.onnx", batch_size=2, precision="int8", **options)
    (check,) = report.checks
    assert check.shape == (12, None, None, 3)  # each of them twice
    assert open_exported(report.path).shape[0] == 2


def test_names_and_opset_are_those_asked_for(photos, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    config = OnnxConfig(opset=17, input_name="x", output_names=["y"])
    options = {"input_size": (3, 64, 64), "preprocess": True, "calibration": photos}
    export(small(), tmp_path / "m.onnx", format=config, precision="int8", **options)
    model = onnx.load(tmp_path / "m.onnx")
    ends = [[end.name for end in ends] for ends in (model.graph.input, model.graph.output)]
    assert ends == [["x"], ["y"]]
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 17)]
    onnx.checker.check_model(model, full_check=True)


def test_what_has_no_matrix_is_refused():
    with pytest.raises(UnsupportedError, match="interpolation 'lanczos'"):
        Preprocessed(Same(), {**CONFIG, "interpolation": "lanczos"})
    with pytest.raises(UnsupportedError, match="crop_mode 'border'"):
        Preprocessed(Same(), {**CONFIG, "interpolation": "bilinear", "crop_mode": "border"})
