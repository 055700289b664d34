"""An ONNX file has the opset asked for and computes the same, or there is none."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from damping import damp
from randomized import randomize
from small_models import small
from tiers import shallow, smallest_of_each_family, smallest_size
from torch import nn

import backbones
from backbones.engines import OnnxConfig, OnnxRuntimeRunner, compare, export
from backbones.engines.opsets import EXPORTED, lower_opset
from backbones.errors import ConfigError, ExportError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
SIZE = (3, 64, 64)
OPSETS = range(11, 18)
LIGHT = {"convnext_atto", "lsnet_t", "patchconvnet_s60"}  # that export in seconds


class Everything(nn.Module):
    """The operations of our models that older opsets have otherwise or not at all."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        first, second = self.norm(x).split([1, 3], dim=1)
        x = torch.cat((F.hardswish(second), first), dim=1)
        x = F.layer_norm(x, x.shape[1:]) * F.layer_norm(x, x.shape[-1:], eps=0.1)
        x = x / x.norm(dim=(2, 3), keepdim=True) + x.amax(1, keepdim=True)
        x = F.pad(F.interpolate(x, scale_factor=2, mode="bilinear"), (1, 0, 2, 0))
        x = x * (x <= 0.5) + x * (x >= 0.75) + x.softmax(1)
        x = x.flatten(2).softmax(-1).unsqueeze(1).squeeze(1) * x.shape[-1]
        return x.reshape(x.shape[0], -1).sum(1, keepdim=True) - F.gelu(x.mean((1, 2)))[:, None]


def opset_of(path):
    return onnx.load(path, load_external_data=False).opset_import[0].version


@pytest.fixture(scope="module")
def newest(tmp_path_factory):
    model = Everything().eval()
    path = tmp_path_factory.mktemp("opsets") / "m.onnx"
    example = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    sizes = ({0: "batch", 2: "height"},)
    torch.onnx.export(model, (example,), path, dynamic_shapes=sizes, opset_version=18, dynamo=True)
    return path, model


@pytest.mark.parametrize("opset", OPSETS)
def test_every_operation_has_a_form_in_older_opsets(newest, opset, tmp_path):
    path, model = newest
    shutil.copy(path, tmp_path / "m.onnx")
    lower_opset(tmp_path / "m.onnx", opset)
    assert opset_of(tmp_path / "m.onnx") == opset
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(3, 4, 8, 5)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(x).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in LIGHT else pytest.mark.slow)
        for name in smallest_of_each_family()
    ],
)
def test_every_family_has_a_form_in_older_opsets(name, tmp_path):
    """Exported once, as that takes the time, and lowered from there as an export does."""
    torch.manual_seed(0)
    model = backbones.create_model(name, num_classes=7, **shallow(name, blocks=1)).eval()
    damp(randomize(model), name)
    side = max(64, smallest_size(model))
    newest = OnnxConfig(opset=EXPORTED)
    export(model, tmp_path / "m.onnx", format=newest, input_size=(3, side, side), verify=False)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(x)
    for opset in (17, 16, 13, 11):
        path = tmp_path / f"{opset}.onnx"
        shutil.copy(tmp_path / "m.onnx", path)
        lower_opset(path, opset)
        file = onnx.load(path)
        assert [(one.domain, one.version) for one in file.opset_import] == [("", opset)]
        assert {node.domain for node in file.graph.node} == {""}
        assert compare(expected, OnnxRuntimeRunner(path)(x)).relative_error < 1e-4, opset


@pytest.mark.parametrize(
    "opset, precision", [(11, "fp32"), (17, "fp32"), (13, "fp16"), (13, "int8"), (21, "fp32")]
)
def test_the_file_has_the_opset_asked_for(opset, precision, tmp_path):
    model = small("convnextv2_atto")
    images = torch.randn(32, *SIZE, generator=torch.Generator().manual_seed(0))
    report = export(
        model,
        tmp_path / "m.onnx",
        format=OnnxConfig(opset=opset),
        input_size=SIZE,
        precision=precision,
        calibration=images if precision == "int8" else None,
    )
    assert report.checks and [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert opset_of(report.path) == opset
    with torch.no_grad():
        found = compare(model(images), OnnxRuntimeRunner(report.path)(images))
    assert found.relative_error < {"fp32": 1e-4, "fp16": 1e-2, "int8": 0.5}[precision]


@pytest.mark.parametrize("opset", [10, 0, -1, "13", 13.0])
def test_no_such_opset(opset):
    with pytest.raises(ConfigError, match=f"no opset {opset!r} can be written; give 11 or later"):
        OnnxConfig(opset=opset)


def test_weights_in_a_second_file_keep_their_place(tmp_path, monkeypatch):
    from backbones.engines import onnx as exporting

    monkeypatch.setattr(exporting, "LARGEST", 1000)
    export(small(), tmp_path / "m.onnx", format=OnnxConfig(opset=13), input_size=SIZE)
    assert opset_of(tmp_path / "m.onnx") == 13
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


@pytest.mark.parametrize(
    "opset, options, error, words",
    [
        (
            11,
            {"preprocess": True},
            ExportError,
            "opset 11 cannot hold this model, 18 and later can",
        ),
        (
            12,
            {"precision": "int8", "calibration": torch.zeros(8, *SIZE)},
            ConfigError,
            "needs opset",
        ),
        (99, {}, ConfigError, "no opset 99; PyTorch's exporter wrote"),
    ],
)
def test_what_an_opset_cannot_hold_leaves_no_file(opset, options, error, words, tmp_path):
    config = OnnxConfig(opset=opset)
    with pytest.raises(error, match=words):
        export(small(), tmp_path / "m.onnx", format=config, input_size=SIZE, **options)
    assert not list(tmp_path.iterdir())
