"""Exported files: what they compute, what they say of themselves, and what is refused."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import backbones
from backbones.engines import (
    FormatConfig,
    OnnxConfig,
    OnnxRuntimeRunner,
    compare,
    export,
    input_size_of,
)
from backbones.errors import (
    ConfigError,
    ExportError,
    InputSizeError,
    MissingDependencyError,
    UnsupportedError,
    WeightsUnavailableError,
)

pytest.importorskip("onnxruntime")
CLASSES = ["ant", "bee", "cat"]


def small(name="convnext_atto", **arguments):
    torch.manual_seed(0)
    shape = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
    return backbones.create_model(name, num_classes=3, **shape, **arguments)


class Constant(nn.Module):
    """A quick classifier."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


class Restless(Constant):
    """Computes something else in every call, so that no file can agree with it."""

    def forward(self, x):
        return super().forward(x) + torch.rand_like(x[:, 0, 0, :3])


class Nested(Constant):
    """Returns what no file can."""

    def forward(self, x):
        return {"logits": super().forward(x)}


class Branching(Constant):
    """Decides by the values of its input, which no graph can."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = small().train()
    path = tmp_path_factory.mktemp("export") / "m.onnx"
    return model, export(model, path, input_size=(3, 64, 64), classes=CLASSES)


def test_the_file_computes_what_the_model_computes(exported):
    import onnxruntime

    model, report = exported
    assert model.training  # exporting leaves the model as it is
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 64, 64]
    assert session.get_inputs()[0].name == "input"
    assert session.get_outputs()[0].name == "logits"
    images = torch.randn(3, 3, 64, 64)
    model.eval()
    with torch.no_grad():
        expected = model(images).numpy()
    model.train()
    (output,) = session.run(None, {"input": images.numpy()})
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)


def test_the_report_tells_how_well_they_agree(exported):
    _, report = exported
    assert report.format == "onnx"
    assert report.engine == "onnxruntime"
    assert report.bytes == report.path.stat().st_size
    assert [check.shape for check in report.checks] == [(1, 3, 64, 64), (5, 3, 64, 64)]
    assert all(check.agreement.relative_error < 1e-5 for check in report.checks)
    assert report.as_dict()["path"] == str(report.path)
    assert [p.name for p in report.path.parent.iterdir()] == ["m.onnx"]


def test_the_file_says_what_it_is(exported):
    model, report = exported
    facts = OnnxRuntimeRunner(report.path).metadata
    assert facts["name"] == "convnext_atto"
    assert facts["classes"] == CLASSES
    assert facts["license"] == model.pretrained_cfg["license"]
    assert facts["arguments"]["dims"] == [8, 16, 24, 32]
    assert facts["input"]["input_size"] == [3, 64, 64]
    assert facts["input"]["mean"] == list(model.pretrained_cfg["mean"])


def test_a_runner_takes_tensors_and_arrays(exported):
    _, report = exported
    runner = OnnxRuntimeRunner(report.path, threads=1)
    assert runner.threads == 1
    images = torch.randn(2, 64, 64, 3).permute(0, 3, 1, 2)  # not contiguous
    by_tensor = runner(images)
    assert isinstance(by_tensor, torch.Tensor)
    by_array = runner(images.numpy())
    assert isinstance(by_array, np.ndarray)
    assert torch.equal(by_tensor, torch.from_numpy(by_array))
    with pytest.raises(InputSizeError, match=r"\(2, 3, 32, 64\)"):
        runner(images[:, :, :32])
    with pytest.raises(InputSizeError):
        runner(images[0])


def test_height_and_width_may_stay_free(tmp_path):
    model = small("convnextv2_atto")
    report = export(
        model, tmp_path / "m.onnx", input_size=(3, 64, 64), dynamic=("batch", "height", "width")
    )
    assert (1, 3, 96, 128) in [check.shape for check in report.checks]
    images = torch.randn(2, 3, 70, 45)
    with torch.no_grad():
        expected = model.eval()(images)
    assert compare(expected, OnnxRuntimeRunner(report.path)(images)).relative_error < 1e-4


def test_a_fixed_batch_and_an_older_opset(tmp_path):
    report = export(
        Constant(),
        tmp_path / "m.bin",
        format=OnnxConfig(opset=18),
        input_size=(3, 8, 8),
        dynamic=(),
    )
    import onnx

    assert onnx.load(report.path).opset_import[0].version == 18
    runner = OnnxRuntimeRunner(report.path)
    assert runner(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    with pytest.raises(InputSizeError):
        runner(torch.zeros(2, 3, 8, 8))


def test_a_file_that_disagrees_does_not_appear(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_text("the file of before")
    with pytest.raises(ExportError, match=r"input \(1, 3, 8, 8\), output \(0, \d\) is .* instead"):
        export(Restless(), path, input_size=(3, 8, 8))
    assert path.read_text() == "the file of before"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    export(Restless(), path, input_size=(3, 8, 8), verify=False)
    assert OnnxRuntimeRunner(path)(torch.zeros(1, 3, 8, 8)).shape == (1, 3)


def test_a_model_that_cannot_be_exported_says_why(tmp_path):
    with pytest.raises(ExportError, match="exporter failed"):
        export(Branching(), tmp_path / "m.onnx", input_size=(3, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_supported_is_named(tmp_path):
    model = Constant()
    with pytest.raises(UnsupportedError, match="did you mean 'onnx'"):
        export(model, tmp_path / "m", format="onx")
    with pytest.raises(UnsupportedError, match="names no format"):
        export(model, tmp_path / "m.txt")
    with pytest.raises(UnsupportedError, match="no format takes FormatConfig"):
        export(model, tmp_path / "m", format=FormatConfig())
    with pytest.raises(UnsupportedError, match="'executorch' has no precision 'fp16'; it has fp32"):
        export(model, tmp_path / "m.pte", precision="fp16")
    with pytest.raises(ConfigError, match="no precision 'int4'"):
        export(model, tmp_path / "m.onnx", precision="int4")
    with pytest.raises(ConfigError, match="int8 needs images to calibrate on"):
        export(model, tmp_path / "m.onnx", precision="int8")
    with pytest.raises(UnsupportedError, match="'height' cannot stay free; give input_size"):
        export(model, tmp_path / "m.tflite", dynamic=("height",))
    with pytest.raises(ConfigError, match="no dynamic dimension 'heigth'"):
        export(model, tmp_path / "m.onnx", dynamic=("heigth",))
    with pytest.raises(ConfigError, match="folder that exists"):
        export(model, tmp_path / "nowhere" / "m.onnx")
    with pytest.raises(UnsupportedError, match="a tensor or a list of them"):
        export(Nested(), tmp_path / "m.onnx", input_size=(3, 8, 8))
    with pytest.raises(UnsupportedError, match="Constant has no stages"):
        export(model, tmp_path / "m.onnx", input_size=(3, 8, 8), features=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [64, (64,), (1, 3, 64, 64), (3, 0, 64), "64"])
@pytest.mark.parametrize("use", ["export", "deploy"])
def test_an_impossible_input_size_is_named(use, size, tmp_path):
    with pytest.raises(ConfigError, match=r"input_size must be \(\[channels,\] height, width\)"):
        if use == "export":
            export(small(), tmp_path / "m.onnx", input_size=size)
        else:
            backbones.deploy(small(), engine="eager", input_size=size, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_channels_of_the_input_size_may_be_left_out():
    model = small(in_chans=2)
    assert input_size_of(model, (40, 48)) == (2, 40, 48)
    assert input_size_of(model, [2, 40, 48]) == (2, 40, 48)
    assert input_size_of(model) == (2, 224, 224)


def test_files_that_are_none(tmp_path):
    with pytest.raises(WeightsUnavailableError, match="no such file"):
        OnnxRuntimeRunner(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_text("hello")
    with pytest.raises(ExportError, match="cannot load"):
        OnnxRuntimeRunner(tmp_path / "m.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf'{package} .*"\.\[onnx\]"'):
        export(Constant(), tmp_path / "m.onnx", input_size=(3, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_compare_measures_and_refuses():
    reference = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    output = torch.tensor([[1.0, 2.0], [4.0, 4.5]])
    agreement = compare(reference, output)
    assert agreement.max_error == 1.5
    assert agreement.mean_error == 0.375
    assert agreement.relative_error == 0.375
    assert agreement.top1_agreement == 0.5
    assert agreement.worst == (1, 1)
    with pytest.raises(ExportError, match="shapes"):
        compare(reference, output[:1])
    with pytest.raises(ExportError, match="exported file's output has values that are not finite"):
        compare(reference, output / 0 * 0)


def test_weights_beyond_the_limit_go_to_a_second_file(tmp_path, monkeypatch):
    from backbones.engines import onnx

    monkeypatch.setattr(onnx, "LARGEST", 1000)
    model = small()
    report = export(model, tmp_path / "m.onnx", input_size=(3, 64, 64))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert report.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert (tmp_path / "m.onnx.data").stat().st_size > (tmp_path / "m.onnx").stat().st_size / 4
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.eval()(images)
    assert compare(expected, OnnxRuntimeRunner(report.path)(images)).relative_error < 1e-4


def test_a_failed_export_leaves_neither_of_two_files(tmp_path, monkeypatch):
    from backbones.engines import onnx

    monkeypatch.setattr(onnx, "LARGEST", 8)
    with pytest.raises(ExportError, match="does not compute"):
        export(Restless(), tmp_path / "m.onnx", input_size=(3, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_the_pyramid_leaves_as_several_outputs(tmp_path):
    model = small(features_only=True)
    classifier = small()
    for source, options in ((model, {}), (classifier, {"features": True})):
        report = export(source, tmp_path / "m.onnx", input_size=(3, 64, 64), **options)
        runner = OnnxRuntimeRunner(report.path)
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            expected = model.eval()(images)
        assert runner.metadata["outputs"] == [f"features_{i}" for i in range(4)]
        found = runner(images)
        assert [tuple(f.shape) for f in found] == [tuple(e.shape) for e in expected]
        assert compare(expected, found).relative_error < 1e-4


def test_exported_models_are_merged_unless_told_otherwise(tmp_path):
    import onnx

    counts = []
    for merge in (True, False):
        model = backbones.create_model("unireplknet_a", num_classes=3, depths=[1, 1, 1, 1])
        path = export(model, tmp_path / "m.onnx", input_size=(3, 64, 64), merge=merge).path
        counts.append(sum(node.op_type == "Conv" for node in onnx.load(path).graph.node))
    assert counts[0] < counts[1]
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
