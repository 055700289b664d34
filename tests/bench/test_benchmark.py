"""One model in every way to run it: what is measured, and what is said of it."""

import json

import pytest
import timm
import torch
from torch import nn

import backbones
from backbones.bench import benchmark, configurations
from backbones.bench.configurations import (
    PUBLISHED,
    Conditions,
    Configuration,
    list_configurations,
)
from backbones.bench.machine import Machine, matmul_peak
from backbones.bench.measuring import Measurement
from backbones.bench.model_spec import specify_model
from backbones.bench.report import BenchReport, markdown, row_of
from backbones.bench.statistics import Times
from backbones.bench.worker import _macs
from backbones.errors import (
    ConfigError,
    MissingDependencyError,
    UnknownModelError,
    UnsupportedError,
)

SHAPE = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
MACHINE = Machine("A Processor", "Linux", 8, 4, {"fp32": 50.0}, 3.9, {"torch": "2"})


@pytest.fixture
def tiny():
    model = backbones.create_model("convnext_atto", num_classes=3, **SHAPE).eval()
    nn.init.normal_(model.get_classifier().weight)
    return model


@torch.no_grad()
def test_a_module_is_measured_with_its_own_weights(tiny, tmp_path):
    spec = specify_model(tiny, tmp_path)
    assert spec.weights == "the given module's"
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(spec.build()(x), tiny(x))


@torch.no_grad()
def test_a_reparameterized_module_stays_so(tmp_path):
    model = backbones.create_model("convnext_atto", num_classes=3, deploy=True, **SHAPE)
    spec = specify_model(model, tmp_path)
    x = torch.randn(1, 3, 32, 32)
    other = spec.build()
    assert other.deployed
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.slow  # the rebuilt model is compared in float64
def test_timms_own_instance_of_one_of_our_models_is_rebuilt(tmp_path):
    model = timm.create_model("convnext_atto", num_classes=3).eval()
    assert type(model).__module__.startswith("timm.")
    spec = specify_model(model, tmp_path)
    assert spec.name == "convnext_atto"
    ours, weight = spec.build(), model.get_classifier().weight
    assert torch.equal(ours.get_classifier().weight, weight)


def test_other_modules_are_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="give its name, or a checkpoint"):
        specify_model(nn.Linear(2, 2), tmp_path)
    with pytest.raises(UnsupportedError, match="ResNet is no model of this package"):
        specify_model(timm.create_model("resnet18"), tmp_path)
    with pytest.raises(ConfigError, match="leave checkpoint and overrides out"):
        specify_model(timm.create_model("resnet18"), tmp_path, overrides={"num_classes": 3})


def test_checkpoints(tiny, tmp_path):
    file = backbones.save_checkpoint(tiny, tmp_path / "m.safetensors")
    for spec in (
        specify_model(str(file), tmp_path),
        specify_model(None, tmp_path, checkpoint=file),
    ):
        assert (spec.name, spec.weights) == ("convnext_atto", str(file))
        assert spec.build().num_classes == 3
    torch.save(tiny.state_dict(), tmp_path / "m.pth")
    with pytest.raises(ConfigError, match="does not say which model it is of"):
        specify_model(tmp_path / "m.pth", tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        specify_model("nothing.safetensors", tmp_path)
    with pytest.raises(ConfigError, match="two checkpoints"):
        specify_model(file, tmp_path, checkpoint=file)


def test_names(tmp_path, monkeypatch):
    monkeypatch.delenv("BACKBONES_WEIGHTS_DIR", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    spec = specify_model("convnext_atto", tmp_path, overrides={"num_classes": 5})
    assert spec.weights == "random"
    assert spec.build().num_classes == 5
    assert specify_model("resnet18", tmp_path).arguments["pretrained"] is False
    with pytest.raises(UnknownModelError, match="did you mean 'convnext_atto'"):
        specify_model("convnext_attto", tmp_path)
    with pytest.raises(ConfigError, match="nothing to measure"):
        specify_model(None, tmp_path)


@torch.no_grad()
def test_released_weights_at_hand_are_used(tmp_path, monkeypatch):
    model = backbones.create_model("convnext_atto")
    folder = tmp_path / "convnext_atto.d2_in1k"
    folder.mkdir()
    backbones.save_checkpoint(model, folder / "model.safetensors")
    monkeypatch.setenv("BACKBONES_WEIGHTS_DIR", str(tmp_path))
    spec = specify_model("convnext_atto", tmp_path)
    assert spec.weights == "released"
    first = next(model.parameters())
    assert torch.equal(next(spec.build().parameters()), first)


def test_the_published_form_comes_first_and_every_pair_follows(monkeypatch):
    installed = ["eager", "compile", "openvino"]
    monkeypatch.setattr(configurations, "available_engines", lambda: installed)
    found = list_configurations(None, ["fp32", "bf16"])
    assert found[0] == PUBLISHED
    assert [str(c) for c in found] == [
        "published",
        *(f"{engine} {precision}" for engine in installed for precision in ("fp32", "bf16")),
    ]
    assert {c.form for c in found[1:]} == {"reparameterized"}
    assert list_configurations(["published"], ["fp32"]) == [PUBLISHED]
    assert list_configurations(["eager", "eager"], ["fp32"])[1:] == [
        Configuration("eager", "fp32", "reparameterized")
    ]
    with pytest.raises(MissingDependencyError, match=r"\.\[onnx\]"):
        list_configurations(["onnxruntime"], ["fp32"])
    with pytest.raises(ConfigError, match="did you mean 'openvino'"):
        list_configurations(["openvno"], ["fp32"])
    with pytest.raises(ConfigError, match="no engines"):
        list_configurations([], ["fp32"])
    with pytest.raises(ConfigError, match="are lists"):
        list_configurations("eager", ["fp32"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"seconds": 0}, "seconds must be more than 0"),
        ({"input_size": (64,)}, "height, width"),
        ({"precisions": ["fp23"]}, "did you mean 'fp32'"),
        ({"precisions": []}, "no precisions"),
        ({"precisions": ["int8"]}, "int8 needs images"),
        ({"precisions": ["int8"], "calibration": "nowhere"}, "nowhere: no such folder"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        benchmark("cpubone_nano", **{"engines": ["published"], **options})


def test_one_size_for_all_models_or_each_its_own():
    own = Conditions(1, 1, None, None)
    assert own.at((3, 96, 96)).input_size == (3, 96, 96)
    assert Conditions(1, 1, (64, 64), None).at((3, 96, 96)).input_size == (64, 64)


@pytest.mark.parametrize("name", ["convnext_atto", "cpubone_nano"])
def test_multiply_adds_are_counted_without_a_second_model(name):
    model = backbones.create_model(name).eval()
    # A tensor that somebody computed cannot be copied, so that any copy of values would fail.
    model.register_buffer("computed", nn.Parameter(torch.ones(1)) * 2)
    assert _macs(model, (3, 224, 224)) == backbones.model_info(name).macs
    assert next(model.parameters()).device.type == "cpu"


def test_machines_that_do_not_grant_their_threads_are_told():
    assert MACHINE.problems == []
    few = Machine("A", "Linux", 2, 4, {"fp32": 50.0}, 2.0, {})
    assert "only 2 CPUs" in few.problems[0]
    limited = Machine("A", "Linux", 8, 4, {"fp32": 50.0}, 2.1, {})
    assert "the time of only 2.1 processors" in limited.problems[0]


def test_matrix_products_are_measured():
    found = matmul_peak(["fp32", "bf16"], seconds=0.02)
    assert set(found["gmacs"]) == {"fp32", "bf16"}
    # half a million times what a program without any library could do in one second, or less
    assert all(0.1 < value < 1e6 for value in found["gmacs"].values())
    assert 0.1 < found["cores"] < 1.5 * torch.get_num_threads()


def measurement(ms, **facts):
    known = {"engine": "eager", "layout": "nchw", "base_mib": 300.0, "load_s": 1.0, "threads": 4}
    turns = [[ms * 0.99, ms, ms * 1.01]] * 12
    return Measurement({**known, **facts}, turns, wall_s=2.0, cpu_s=6.0, peak_mib=400.0)


def test_figures_of_a_row():
    baseline = Times(measurement(20.0).turns)
    macs = 250_000_000
    configuration = Configuration("openvino", "bf16", "reparameterized")
    found = measurement(10.0, engine="openvino", engine_threads=3)
    row = row_of(configuration, found, baseline, macs, 2, MACHINE)
    assert (row.median_ms, row.calls, row.threads, row.cores) == (10.0, 36, 3, 3.0)
    assert row.images_per_second == 200
    assert row.gmacs_per_second == pytest.approx(50)
    assert row.share_of_peak == pytest.approx(1)
    assert row.speedup == pytest.approx(2)
    assert row.certain is True
    near = row_of(configuration, measurement(20.0), baseline, None, 1, MACHINE)
    assert near.certain is False
    assert near.gmacs_per_second is None
    failed = row_of(configuration, Measurement(reason="no bf16"), baseline, macs, 1, MACHINE)
    assert (failed.median_ms, failed.reason) == (None, "no bf16")


def test_a_report_for_people_and_for_programs():
    published = measurement(20.0)
    rows = tuple(
        row_of(configuration, found, Times(published.turns), 10**9, 1, MACHINE)
        for configuration, found in [
            (PUBLISHED, published),
            (Configuration("eager", "fp32", "reparameterized"), measurement(10.0)),
            (
                Configuration("eager", "int8", "reparameterized"),
                Measurement(reason="no such thing"),
            ),
        ]
    )
    facts = ("a", "random", 5_000_000, 10**9, 1, (3, 64, 64), MACHINE, rows, "it is", True, ("hm",))
    report = BenchReport(*facts)
    assert report.best.name == "eager fp32"
    text = str(report)
    assert "5.00 M parameters, 1.000 GMACs, batch of 1 at 3 x 64 x 64, random weights" in text
    assert "matrix products reach 50 (fp32) GMAC/s" in text
    assert "eager int8 was not measured: no such thing" in text
    assert text.endswith("hm\nit is")
    assert json.loads(json.dumps(report.as_dict()))["best"] == "eager fp32"


def test_tables_are_aligned():
    cells = [["x", "long", "1.0"], ["longer", "y", "10.25"]]
    lines = markdown([dict(zip("abc", row)) for row in cells]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0] == "| a      | b    |     c |"
    assert lines[1] == "| ------ | ---- | ----: |"
