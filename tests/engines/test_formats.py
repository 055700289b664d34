"""The export matrix: every family in every format, in its real engine, against the model.

`export` itself compares at two batch sizes (and two image sizes where they are free) and refuses
what is off by more than 1e-4; these tests compare once more, independently, on other values.
"""

import importlib
from pathlib import Path

import pytest
import torch
from damping import damp
from randomized import randomize
from small_models import small
from tiers import representatives, shallow, smallest_of_each_family, smallest_size

import backbones
from backbones.engines import export, open_exported
from backbones.errors import UnsupportedError

SUFFIXES = {
    "onnx": ".onnx",
    "openvino": ".xml",
    "pt2": ".pt2",
    "aoti": ".aoti",
    "executorch": ".pte",
}
ENGINES = {"onnx": "onnxruntime"}
TOLERANCE = 1e-4
# Shallow models: by default those that are quick, where the smoke tier has every family as ONNX;
# compiling takes a minute a model, lowering half of one. All other cells if slow, and whole models
# as ONNX.
LIGHT = {"convnext_atto", "cpubone_nano", "inception_next_atto"}
QUICK = {
    "onnx": LIGHT,
    "openvino": LIGHT,
    "pt2": LIGHT,
    "aoti": {"convnext_atto"},
    "executorch": {"cpubone_nano"},
}
QUICK_SIZE = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}  # of convnext_atto, to compile


def cells():
    for name in smallest_of_each_family():
        for format in SUFFIXES:
            quick = name in QUICK[format]
            arguments = QUICK_SIZE if quick and format == "aoti" else shallow(name, blocks=1)
            marks = () if quick else pytest.mark.slow
            yield pytest.param(name, format, arguments, marks=marks, id=f"{name}-{format}")
        yield pytest.param(name, "onnx", {}, marks=pytest.mark.slow, id=f"{name}-onnx-whole")


def model_of(name, **arguments):
    """Return a model whose every weight counts; fresh ones have residual branches near zero."""
    torch.manual_seed(0)
    model = backbones.create_model(name, num_classes=7, **arguments).eval()
    return damp(randomize(model), name)


def differences(model, runner, shape):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(images)
    found = runner(images)
    return float((expected - found).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name, format, arguments", cells())
def test_every_family_leaves_in_every_format(name, format, arguments, tmp_path):
    pytest.importorskip({"openvino": "openvino", "executorch": "executorch"}.get(format, "onnx"))
    model = model_of(name, **arguments)
    path = tmp_path / f"m{SUFFIXES[format]}"
    report = export(model, path, input_size=(3, 64, 64))
    assert report.engine == ENGINES.get(format, format)
    assert [check.shape for check in report.checks] == [(1, 3, 64, 64), (5, 3, 64, 64)]
    runner = open_exported(path)
    for batch in (1, 3):
        assert differences(model, runner, (batch, 3, 64, 64)) < TOLERANCE
    assert runner.metadata["name"] == name
    if format == "executorch":
        assert 0.2 < report.notes["delegated_share"] <= 1


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[] if name in ("convnext_atto", "lsnet_t", "overlock_xt") else [pytest.mark.slow],
        )
        for name in [*smallest_of_each_family(), "hornet_tiny_gf"]
    ],
)
def test_height_and_width_stay_free_in_onnx(name, tmp_path):
    model = model_of(name, **shallow(name))
    path = tmp_path / "m.onnx"
    free = ("batch", "height", "width")
    if model.fixed_size_reason:
        with pytest.raises(UnsupportedError, match="one file a size"):
            export(model, path, input_size=(3, 64, 64), dynamic=free)
        return
    report = export(model, path, input_size=(3, 64, 64), dynamic=free)
    assert [check.shape for check in report.checks][-1] == (1, 3, 96, 128)
    runner = open_exported(path)
    for size in ((128, 96), (72, 200), (32, 32), (225, 250)):
        if min(size) >= smallest_size(model):
            assert differences(model, runner, (2, 3, *size)) < TOLERANCE, size


@pytest.mark.slow
@pytest.mark.parametrize("name", representatives())
def test_every_structure_leaves_as_onnx(name, tmp_path):
    model = model_of(name, **shallow(name, blocks=1))
    side = max(64, smallest_size(model))
    report = export(model, tmp_path / "m.onnx", input_size=(3, side, side))
    assert max(check.agreement.relative_error for check in report.checks) < TOLERANCE


@pytest.mark.parametrize(
    "suffix, package",
    [
        (".onnx", "onnx"),
        (".xml", "openvino"),
        (".pt2", "torch"),
        (".ncnn.param", "pnnx"),
        pytest.param(".pte", "executorch", marks=pytest.mark.slow),
        pytest.param(".aoti", "torch", marks=pytest.mark.slow),
    ],
)
def test_a_path_from_where_one_is(suffix, package, tmp_path, monkeypatch):
    """Converters that are programs of their own may run elsewhere."""
    pytest.importorskip(package)
    (tmp_path / "files").mkdir()
    monkeypatch.chdir(tmp_path)
    model = small()
    for path in (Path(f"m{suffix}"), Path("files", f"m{suffix}")):
        assert export(model, path, input_size=(3, 64, 64)).path == path
        assert differences(model, open_exported(path), (1, 3, 64, 64)) < TOLERANCE


def test_a_plain_model_of_timm_leaves_merged(tmp_path):
    import timm

    importlib.import_module("onnxruntime")
    model = timm.create_model("resnet10t", num_classes=5).eval()
    report = export(model, tmp_path / "m.onnx", input_size=(3, 64, 64))
    assert report.checks
    assert differences(model, open_exported(report.path), (2, 3, 64, 64)) < TOLERANCE
