"""Core ML: packages, which run on macOS only and are read back elsewhere.

What a saved package computes is told by an evaluator of its operations, against the model. By
default three families leave, shallow; the others are slow.
"""

import dataclasses
import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from damping import damp
from mil_evaluator import Package
from randomized import randomize
from small_models import small
from tiers import shallow, smallest_of_each_family, smallest_size
from timm.data import resolve_model_data_config

import backbones
from backbones.cli import main
from backbones.engines import CoreMlConfig, export, open_exported
from backbones.engines.coreml import runner as coreml_runner
from backbones.engines.preparation import Preprocessed
from backbones.engines.targets import FORMATS
from backbones.errors import (
    ConfigError,
    ExportError,
    MissingDependencyError,
    UnsupportedError,
)
from backbones.weights import save_checkpoint

SIZE = (3, 64, 64)
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3}
LIGHT = {"convnext_atto", "cpubone_nano", "inception_next_atto"}
CLASSES = ["ant", "bee", "ant"]
_needs = pytest.mark.skipif(
    find_spec("coremltools") is None, reason='needs coremltools, the extra "coreml"'
)


def needs_coreml(test):
    return pytest.mark.coreml(_needs(test))


@pytest.fixture(autouse=True)
def no_mac(monkeypatch):
    """Let tests be the same on a Mac; one test plays one."""
    monkeypatch.setattr(coreml_runner, "RUNS_HERE", False)
    reading = dataclasses.replace(FORMATS["coreml"], read_back=coreml_runner.read_package)
    monkeypatch.setitem(FORMATS, "coreml", reading)


def images(count=1, size=SIZE, seed=4):
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(seed))


def outputs(model, x):
    with torch.no_grad():
        return model.eval()(x)


def error_of(expected, found):
    assert found.shape == expected.shape
    return float((expected - found).abs().max() / expected.abs().max())


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "coremltools"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(MissingDependencyError, match=r'coremltools .*"\.\[coreml\]"') as caught:
        export(small(), tmp_path / "m.mlpackage", input_size=SIZE)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"dynamic": ("height",)}, UnsupportedError, "'height' cannot stay free; give input_size"),
        ({"precision": "bf16"}, UnsupportedError, "'coreml' has no precision 'bf16'; it has fp16"),
        (
            {"preprocess": True, "batch_size": 2},
            UnsupportedError,
            "1 or 3 channels, not 2 of 3; leave preprocess out",
        ),
        ({"classes": ["ant", "bee"]}, ConfigError, "2 class names for 3 logits"),
    ],
)
def test_what_cannot_be_leaves_no_file(options, error, words, tmp_path):
    with pytest.raises(error, match=words):
        export(small(), tmp_path / "m.mlpackage", input_size=SIZE, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "values, words",
    [(("iOS14",), "no target 'iOS14'; there are iOS15"), (("iOS16", 0), "no package for 0 images")],
)
def test_options_are_checked(values, words):
    with pytest.raises(ConfigError, match=words):
        CoreMlConfig(*values)


def test_other_systems_do_not_run_it(tmp_path):
    with pytest.raises(UnsupportedError, match=r"m\.mlpackage: Core ML files run on macOS only"):
        open_exported(tmp_path / "m.mlpackage")


def test_the_target_is_for_this_format_alone(tmp_path, capsys):
    saved = str(save_checkpoint(small(), tmp_path / "m.safetensors"))
    assert main(["export", saved, str(tmp_path / "m.onnx"), "--minimum-target", "iOS17"]) == 2
    assert "--minimum-target: Core ML files alone have it" in capsys.readouterr().err


def test_a_file_in_the_way_stays(tmp_path):
    path = tmp_path / "m.mlpackage"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="give a folder"):
        export(small(), path, input_size=SIZE)
    assert path.read_text() == "mine"


def cells():
    for name in [*smallest_of_each_family(), "hornet_tiny_gf"]:
        marks = () if name in LIGHT else pytest.mark.slow
        yield pytest.param(name, marks=marks)


@needs_coreml
@pytest.mark.parametrize("name", cells())
def test_every_family_leaves(name, tmp_path):
    torch.manual_seed(0)
    model = backbones.create_model(name, num_classes=7, **shallow(name, blocks=1)).eval()
    damp(randomize(model), name)
    size = (3, *[max(64, smallest_size(model))] * 2)
    for precision, tolerance in TOLERANCE.items():
        path = tmp_path / f"{precision}.mlpackage"
        report = export(model, path, input_size=size, precision=precision)
        assert report.engine is None and report.checks == ()
        package = Package(path)
        for seed in (5, 6):
            x = images(1, size, seed)
            assert error_of(outputs(model, x), package(x)["logits"]) < tolerance, precision
        assert package.facts["name"] == name


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = small()
    path = tmp_path_factory.mktemp("coreml") / "m.mlpackage"
    return model, export(model, path, input_size=SIZE, classes=CLASSES)


@needs_coreml
def test_half_precision_is_the_default(exported):
    model, report = exported
    assert report.precision == "fp16"
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    assert report.notes["weights"] >= weights
    content = report.path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    assert 2 * weights <= content.stat().st_size < 3 * weights
    parts = [part for part in report.path.rglob("*") if part.is_file()]
    assert report.bytes == sum(part.stat().st_size for part in parts)
    x = images()
    found = Package(report.path)(x)["logits"]
    assert found.dtype == torch.float32
    assert 1e-6 < error_of(outputs(model, x), found) < 5e-3


@needs_coreml
def test_the_report_says_that_it_was_not_run(exported):
    report = exported[1]
    assert report.engine is None and report.checks == ()
    assert report.notes["operations"] > 20
    line = str(report).splitlines()[1]
    assert line.startswith("  not run: Core ML files run on macOS only; read back and checked:")
    assert f"{report.notes['operations']} operations, {report.notes['weights']} weights" in line
    assert line.endswith("for iOS16 (macOS13) and later")


@needs_coreml
def test_the_package_says_what_it_is(exported):
    package = Package(exported[1].path)
    facts = package.facts
    assert facts["name"] == "convnext_atto" and facts["classes"] == CLASSES
    assert facts["input"]["input_size"] == [*SIZE]
    assert facts["minimum_target"] == "iOS16"
    assert {"license", "provenance", "arguments"} <= {*facts}
    metadata = package.description.metadata
    assert metadata.shortDescription == "convnext_atto: images to class scores"
    assert metadata.license == facts["license"] == "apache-2.0"
    # Nothing of this machine, and nothing that no program for Apple's systems reads.
    names = {part.name for part in exported[1].path.iterdir()}
    assert names == {"Data", "Manifest.json"}


@needs_coreml
def test_a_classifier_names_the_classes(exported):
    model, report = exported
    package, x = Package(report.path), images()
    assert package.description.predictedFeatureName == "classLabel"
    assert package.description.predictedProbabilitiesName == "classLabel_probs"
    found = package(x)
    assert [*found] == ["classLabel", "classLabel_probs", "logits"]
    expected = outputs(model, x).softmax(1)[0]
    labels = ["ant (0)", "bee", "ant (2)"]  # Core ML keeps one probability a label
    assert [*found["classLabel_probs"]] == labels
    np.testing.assert_allclose([*found["classLabel_probs"].values()], expected, atol=2e-3)
    assert found["classLabel"] == labels[int(expected.argmax())]


@needs_coreml
@pytest.mark.parametrize("crop_pct, resizes", [(0.875, True), (1.0, False)])
def test_an_image_goes_in(crop_pct, resizes, tmp_path):
    model = small()
    model.pretrained_cfg.update(crop_pct=crop_pct)
    path = tmp_path / "m.mlpackage"
    report = export(model, path, input_size=SIZE, preprocess=True, precision="fp32")
    assert report.notes["input"] == "image"
    package = Package(path)
    kind = package.description.input[0].type.imageType
    assert (kind.width, kind.height) == (64, 64)
    assert kind.ColorSpace.Name(kind.colorSpace) == "RGB"
    config = {**resolve_model_data_config(model), "input_size": SIZE}
    photo = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    photo = torch.from_numpy(photo)
    expected = outputs(Preprocessed(model, config), photo)
    assert error_of(expected, package(photo.permute(0, 3, 1, 2))["logits"]) < 1e-4
    assert ("matmul" in {one.op_type for one in package.operations}) == resizes


@needs_coreml
def test_the_maps_of_all_stages_leave_in_order(tmp_path):
    model = small()
    path = tmp_path / "m.mlpackage"
    export(model, path, input_size=SIZE, features=True, precision="fp32", classes=CLASSES)
    x = images()
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)
    found = Package(path)(x)
    assert [*found] == [f"features_{i}" for i in range(4)]
    assert max(error_of(e, f) for e, f in zip(expected, found.values())) < 1e-4


@needs_coreml
def test_a_fixed_batch_for_a_later_target(tmp_path):
    model = small()
    path = tmp_path / "m.mlpackage"
    options = {"input_size": SIZE, "batch_size": 2, "precision": "fp32", "classes": CLASSES}
    report = export(model, path, format=CoreMlConfig("iOS17"), **options)
    assert report.dynamic == () and report.notes["images_a_call"] == 2
    assert "for iOS17 (macOS14) and later" in str(report)
    x = images(2)
    found = Package(path)(x)
    assert [*found] == ["logits"]  # Core ML classifies one image
    assert error_of(outputs(model, x), found["logits"]) < 1e-4


def _without_facts(spec):
    del spec.description.metadata.userDefined["backbones"]


def _other_input(spec):
    spec.description.input[0].type.multiArrayType.shape[3] = 32


def _other_output(spec):
    spec.description.output[0].name = "scores"


def _other_operation(spec):
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    next(one for one in block.operations if one.type == "gelu").type = "gellu"


def _spoil_weights(path):
    content = path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    values = bytearray(content.read_bytes())
    values[-64:] = b"\xff" * 64  # not a number
    content.write_bytes(bytes(values))


@needs_coreml
@pytest.mark.parametrize(
    "spoil, words, old",
    [
        (_without_facts, "it does not say what it holds", False),
        (_other_input, r"input size are \(1, 3, 64, 32\), not \(1, 3, 64, 64\)", True),
        (_other_output, r"outputs are \['scores'\], not \['logits'\]", False),
        (_other_operation, "cannot be read back: .*gellu", True),
        (None, "are not finite", False),
        (None, "are not finite", True),
    ],
)
def test_a_failed_check_leaves_what_was_there(spoil, words, old, tmp_path, monkeypatch):
    whole = FORMATS["coreml"]
    path = tmp_path / "m.mlpackage"

    def convert(conversion, config, place):
        import coremltools

        notes = whole.convert(conversion, config, place)
        if spoil is None:
            _spoil_weights(place)
        else:
            model = place / "Data" / "com.apple.CoreML" / "model.mlmodel"
            spec = coremltools.proto.Model_pb2.Model.FromString(model.read_bytes())
            spoil(spec)
            model.write_bytes(spec.SerializeToString())
        return notes

    if old:
        path.mkdir()
        (path / "mine.txt").write_text("mine")
    monkeypatch.setitem(FORMATS, "coreml", dataclasses.replace(whole, convert=convert))
    with pytest.raises(ExportError, match=words):
        export(small(), path, input_size=SIZE)
    found = [part.relative_to(tmp_path).as_posix() for part in tmp_path.rglob("*")]
    assert sorted(found) == (["m.mlpackage", "m.mlpackage/mine.txt"] if old else [])


@needs_coreml
def test_an_old_package_is_replaced_whole(tmp_path):
    path = tmp_path / "m.mlpackage"
    path.mkdir()
    (path / "old.txt").write_text("of another model")
    export(small(), path, input_size=SIZE)
    assert sorted(part.name for part in tmp_path.iterdir()) == ["m.mlpackage"]
    assert sorted(part.name for part in path.iterdir()) == ["Data", "Manifest.json"]


@pytest.fixture
def mac(monkeypatch, no_mac):
    """A Mac whose Core ML is the evaluator."""
    coremltools = pytest.importorskip("coremltools")

    class OnMac(coremltools.models.MLModel):
        def __init__(self, path, **options):
            super().__init__(path, skip_model_load=True)

        def predict(self, given):
            package, (x,) = Package(self.package_path), given.values()
            if not isinstance(x, np.ndarray):
                x = np.array(x).transpose(2, 0, 1)[None]
            leaves = package(torch.from_numpy(x)).items()
            return {n: v.numpy() if isinstance(v, torch.Tensor) else v for n, v in leaves}

    monkeypatch.setattr(coremltools.models, "MLModel", OnMac)
    monkeypatch.setattr(coreml_runner, "RUNS_HERE", True)
    running = dataclasses.replace(FORMATS["coreml"], read_back=None)
    monkeypatch.setitem(FORMATS, "coreml", running)


@needs_coreml
@pytest.mark.parametrize("raw", [False, True], ids=["array", "image"])
def test_on_a_mac_it_is_run_and_compared(raw, mac, tmp_path):
    path = tmp_path / "m.mlpackage"
    options = {"input_size": SIZE, "preprocess": raw, "classes": CLASSES}
    report = export(small(), path, **options)
    assert report.engine == "coreml"
    assert [check.shape[0] for check in report.checks] == [1, 5]
    assert "coreml on random images" in str(report) and "not run" not in str(report)
    runner = open_exported(path)
    assert runner.raw is raw and runner.precision == "fp16"
    assert runner.shape == ((None, 64, 64, 3) if raw else (None, *SIZE))
    assert runner.metadata["classes"] == CLASSES


@needs_coreml
def test_on_a_mac_a_wrong_file_is_refused(mac, tmp_path, monkeypatch):
    from mil_evaluator import OPERATIONS

    monkeypatch.setitem(OPERATIONS, "gelu", lambda x, a: [x, a["mode"]][0])
    with pytest.raises(ExportError, match="does not compute what the model computes"):
        export(small(), tmp_path / "m.mlpackage", input_size=SIZE)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_coreml
def test_the_command_prints_its_answer_alone(tmp_path):
    saved = str(save_checkpoint(small(), tmp_path / "m.safetensors"))
    path = tmp_path / "m.mlpackage"
    command = [sys.executable, "-m", "backbones", "export", saved, str(path), "--img-size", "64"]
    options = ["--minimum-target", "iOS17", "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert done.stderr == ""
    assert (report["format"], report["precision"]) == ("coreml", "fp16")
    assert report["engine"] is None and report["checks"] == []
    assert report["notes"]["minimum_target"] == "iOS17"
    assert "run on macOS only" in report["notes"]["not_run"]
    assert error_of(outputs(small(), images()), Package(path)(images())["logits"]) < 5e-3
