"""LiteRT: files for phones, run in their real runtime, which an extra of its own brings.

Converting takes half a minute a model, so that by default three families leave, shallow; the others
are slow.
"""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from damping import damp
from file_checks import SIZE, error_of, images, outputs
from randomized import randomize
from small_models import small
from tiers import shallow, smallest_of_each_family, smallest_size
from torch import nn

import backbones
from backbones.cli import main
from backbones.engines import ENGINES, LiteRtConfig, deploy, export, open_exported, requesting
from backbones.errors import (
    ConfigError,
    ExportError,
    InputSizeError,
    MissingDependencyError,
    UnsupportedError,
)
from backbones.weights import save_checkpoint

needs_litert = pytest.mark.skipif(
    not ENGINES["litert"].installed, reason='needs LiteRT, the extra "litert"'
)
LIGHT = {"convnext_atto", "cpubone_nano", "inception_next_atto"}
CLASSES = ["ant", "bee", "cat"]


def in_litert(path, x):
    """Run a file as other programs do, by its signature."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    run = interpreter.get_signature_runner()
    return run.get_input_details(), run(input=np.ascontiguousarray(x))


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    for package in ("ai_edge_litert", "litert_torch"):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r'litert_torch .*"\.\[litert\]"'):
        export(small(), tmp_path / "m.tflite", input_size=SIZE)
    assert not list(tmp_path.iterdir())
    with pytest.raises(MissingDependencyError, match=r'ai_edge_litert.* .*"\.\[litert\]"'):
        open_exported(tmp_path / "m.tflite")


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"dynamic": ("height",)}, UnsupportedError, "'height' cannot stay free; give input_size"),
        ({"precision": "bf16"}, UnsupportedError, "'litert' has no precision 'bf16'; it has fp32"),
        ({"format": LiteRtConfig("nchw"), "preprocess": True}, ConfigError, "leave input_layout"),
        (
            {"precision": "int8", "preprocess": True, "calibration": torch.zeros(2, *SIZE)},
            UnsupportedError,
            "int8 files of LiteRT take normalized images; leave preprocess out",
        ),
    ],
)
def test_what_cannot_be_leaves_no_file(options, error, words, tmp_path):
    with pytest.raises(error, match=words):
        export(small(), tmp_path / "m.tflite", input_size=SIZE, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "values, words",
    [(("nhcw",), "no layout 'nhcw'; there are nhwc, nchw"), (("nhwc", 0), "no file for 0 images")],
)
def test_options_are_checked(values, words):
    with pytest.raises(ConfigError, match=words):
        LiteRtConfig(*values)


def test_the_layout_is_for_this_format_alone(tmp_path, capsys):
    saved = str(save_checkpoint(small(), tmp_path / "m.safetensors"))
    assert main(["export", saved, str(tmp_path / "m.onnx"), "--input-layout", "nchw"]) == 2
    assert "--input-layout: LiteRT files alone have it" in capsys.readouterr().err


def cells():
    for name in [*smallest_of_each_family(), "hornet_tiny_gf"]:
        marks = [pytest.mark.litert, needs_litert]
        yield pytest.param(name, marks=marks if name in LIGHT else [*marks, pytest.mark.slow])


class HighestAlone(nn.Module):
    """The means of the two brightest channels of each image."""

    def forward(self, x):
        return x.mean((2, 3)).topk(2).values


@pytest.mark.litert
@needs_litert
def test_the_runtime_has_no_sort_yet(tmp_path):
    """Why the light UniFormer gathers what it chose; when this fails, a version has mended it."""
    with pytest.raises(ExportError, match="LiteRT cannot load it.*STABLEHLO_SORT"):
        export(HighestAlone().eval(), tmp_path / "m.tflite", input_size=SIZE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", cells())
def test_every_family_leaves(name, tmp_path):
    torch.manual_seed(0)
    model = backbones.create_model(name, num_classes=7, **shallow(name, blocks=1)).eval()
    damp(randomize(model), name)
    side = max(64, smallest_size(model))
    report = export(model, tmp_path / "m.tflite", input_size=(3, side, side))
    assert report.engine == "litert"
    assert [check.shape[0] for check in report.checks] == [1, 5]
    runner = open_exported(report.path)
    assert error_of(model, runner, images(3, (3, side, side))) < 1e-4
    assert runner.metadata["name"] == name


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = small()
    path = tmp_path_factory.mktemp("litert") / "m.tflite"
    return model, export(model, path, input_size=SIZE, classes=CLASSES)


@pytest.mark.litert
@needs_litert
def test_the_file_says_what_it_is(exported):
    _, report = exported
    facts = open_exported(report.path).metadata
    assert facts["name"] == "convnext_atto"
    assert facts["classes"] == CLASSES
    assert facts["input"]["input_size"] == [*SIZE]
    assert facts["input_layout"] == report.notes["input_layout"] == "nhwc"
    assert {"license", "provenance", "arguments"} <= {*facts}
    # Other programs find the same JSON by the name of the metadata buffer.
    content = report.path.read_bytes()
    assert json.dumps(facts["classes"]).encode() in content
    assert [p.name for p in report.path.parent.iterdir()] == ["m.tflite"]


@pytest.mark.litert
@needs_litert
def test_programs_for_phones_give_channels_last(exported):
    model, report = exported
    x = images(1)
    taken, given = in_litert(report.path, x.permute(0, 2, 3, 1).numpy())
    assert [*taken["input"]["shape"]] == [1, 64, 64, 3]
    np.testing.assert_allclose(given["logits"], outputs(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.litert
@needs_litert
@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_runner_takes_any_number_of_images(exported, count):
    model, report = exported
    assert error_of(model, open_exported(report.path, threads=1), images(count)) < 1e-4


@pytest.mark.litert
@needs_litert
def test_other_files_are_refused(exported, tmp_path):
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    content = schema.ModelT.InitFromObj(schema.Model.GetRootAs(exported[1].path.read_bytes(), 0))
    content.metadata = []
    flatbuffer_utils.write_model(content, str(tmp_path / "other.tflite"))
    with pytest.raises(ExportError, match="another program wrote it"):
        open_exported(tmp_path / "other.tflite")
    (tmp_path / "broken.tflite").write_bytes(b"hello, this is no model")
    with pytest.raises(ExportError, match="LiteRT cannot load it"):
        open_exported(tmp_path / "broken.tflite")


@pytest.mark.litert
@needs_litert
def test_a_fixed_batch_in_the_layout_asked_for(tmp_path):
    model = small()
    path = tmp_path / "m.tflite"
    report = export(model, path, format=LiteRtConfig("nchw"), input_size=SIZE, batch_size=2)
    assert report.dynamic == ()
    assert [check.shape for check in report.checks] == [(2, *SIZE)]
    x = images(2)
    taken, given = in_litert(path, x.numpy())
    assert [*taken["input"]["shape"]] == [2, *SIZE]
    np.testing.assert_allclose(given["logits"], outputs(model, x), rtol=1e-4, atol=1e-4)
    runner = open_exported(path)
    assert error_of(model, runner, x) < 1e-4
    with pytest.raises(InputSizeError, match=r"shape \(2, 3, 64, 64\), got \(3,"):
        runner(images(3))


@pytest.mark.litert
@needs_litert
def test_the_maps_of_all_stages_leave_in_order(tmp_path):
    model = small()
    report = export(model, tmp_path / "m.tflite", input_size=SIZE, features=True)
    x = images(2)
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)
    found = open_exported(report.path)(x)
    assert [f.shape for f in found] == [e.shape for e in expected]
    assert max(float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected)) < 1e-4


@pytest.mark.litert
@needs_litert
def test_weights_in_half_precision(exported, tmp_path):
    model, whole = exported
    report = export(model, tmp_path / "m.tflite", input_size=SIZE, precision="fp16")
    assert report.bytes < 0.8 * whole.bytes  # of a small file not all is weights
    assert 1e-6 < error_of(model, open_exported(report.path), images()) < 5e-3


@pytest.fixture(scope="module")
def digits():
    """A model that tells scikit-learn's handwritten digits apart, and those it has not seen."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    x = F.interpolate(x, size=64, mode="bilinear").expand(-1, 3, -1, -1)
    y = torch.from_numpy(data.target)
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    train, val = order[:1437], order[1437:]
    model = backbones.create_model("cpubone_nano", num_classes=10).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(4):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - epoch / 4)
        for part in train[torch.randperm(len(train))].split(32)[:-1]:
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    assert (outputs(model, x[val]).argmax(1) == y[val]).float().mean() > 0.9
    return model, x[train[:128]], x[val], y[val]


@pytest.mark.litert
@needs_litert
def test_int8_of_a_trained_model(digits, tmp_path):
    model, known, unseen, labels = digits
    path = tmp_path / "int8.tflite"
    report = export(model, path, input_size=SIZE, precision="int8", calibration=known)
    assert report.bytes < 1.4 * sum(p.numel() for p in model.parameters())
    assert report.checks[-1].real and report.checks[-1].shape == (128, *SIZE)
    expected, found = outputs(model, unseen), open_exported(path)(unseen)
    assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.98
    right = [(one.argmax(1) == labels).float().mean() for one in (expected, found)]
    assert right[1] >= right[0] - 0.01
    # Ranges are those of all images: an average of them would cut what is strong in a few.
    assert 1e-4 < float((found - expected).abs().max() / expected.abs().max()) < 0.08
    taken, given = in_litert(path, unseen[:1].permute(0, 2, 3, 1).numpy())
    assert taken["input"]["dtype"] is given["logits"].dtype.type is np.float32


@pytest.mark.litert
@needs_litert
def test_preprocessing_in_the_file(tmp_path):
    model = small()
    report = export(model, tmp_path / "m.tflite", input_size=SIZE, preprocess=True)
    photo = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    runner = open_exported(report.path)
    assert runner.raw and runner.shape == (None, 64, 64, 3)
    found = runner(photo)
    taken, given = in_litert(report.path, photo[:1])
    assert taken["input"]["dtype"] is np.uint8
    np.testing.assert_allclose(given["logits"], found[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.litert
@needs_litert
def test_the_engine_is_started_once(tmp_path, monkeypatch):
    model = small()
    options = {"engine": "litert", "input_size": SIZE, "batch_size": 2, "cache_dir": tmp_path}
    runner = deploy(model, threads=1, **options)
    assert (runner.engine, runner.precision, runner.threads) == ("litert", "fp32", 1)
    assert runner.path.name == "fp32-2.tflite"
    for count in (1, 2, 5):
        assert error_of(model, runner, images(count)) < 1e-4

    def refuse(*_, **__):
        raise AssertionError("nothing is to be exported again")

    monkeypatch.setattr(requesting, "export", refuse)
    again = deploy(model, threads=2, **options)
    assert again.threads == 2
    assert error_of(model, again, images(2)) < 1e-4


@pytest.mark.litert
@needs_litert
def test_the_command(tmp_path, capsys):
    saved = str(save_checkpoint(small(), tmp_path / "m.safetensors"))
    path = tmp_path / "m.tflite"
    options = ["--img-size", "64", "--input-layout", "nchw", "--json"]
    assert main(["export", saved, str(path), *options]) == 0
    report = json.loads(capsys.readouterr().out)  # the converter prints nothing between
    assert report["format"] == "litert" and report["notes"]["input_layout"] == "nchw"
    assert in_litert(path, images(1).numpy())[1]["logits"].shape == (1, 3)
