"""ncnn: files for phones and boards, converted by pnnx and run in ncnn itself."""

import json
import subprocess
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

import backbones
from backbones.cli import main
from backbones.engines import deploy, export, open_exported, requesting
from backbones.engines.ncnn import conversion as converting
from backbones.engines.ncnn import spelling
from backbones.engines.ncnn.spelling import Respelled
from backbones.errors import (
    ExportError,
    InputSizeError,
    MissingDependencyError,
    UnsupportedError,
    WeightsUnavailableError,
)
from backbones.weights import save_checkpoint

ncnn = pytest.importorskip("ncnn")
pytest.importorskip("pnnx")

FILES = ["m.ncnn.bin", "m.ncnn.json", "m.ncnn.param"]
# What stands in the way, as the error names it. The dense form of UniFormer leaves.
WITHOUT = {
    "overlock_xt": "ncnn has no operation for torch.index_select in OverLoCK",
    "uniformer_xxs": "ncnn has no operation for .*torch.topk in UniFormer",
}


def in_ncnn(path, image, half=True):
    """Run a file as other programs do, by ncnn's own defaults or without rounding."""
    net = ncnn.Net()
    for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic"):
        setattr(net.opt, f"use_{name}", half)
    assert net.load_param(str(path)) == 0
    assert net.load_model(str(path.with_suffix(".bin"))) == 0
    extractor, pixels = net.create_extractor(), np.ascontiguousarray(image)
    extractor.input("in0", ncnn.Mat(pixels).clone())  # it does not keep the array alive
    return np.array(extractor.extract("out0")[1])


@pytest.mark.parametrize("name", [*smallest_of_each_family(), "hornet_tiny_gf", "uniformer_small"])
def test_every_family_leaves_or_says_why_not(name, tmp_path):
    torch.manual_seed(0)
    model = backbones.create_model(name, num_classes=7, **shallow(name, blocks=1)).eval()
    damp(randomize(model), name)
    size = (3, *[max(64, smallest_size(model))] * 2)
    path = tmp_path / "m.ncnn.param"
    if name in WITHOUT:
        with pytest.raises(ExportError, match=f"m.ncnn.param: {WITHOUT[name]}"):
            export(model, path, input_size=size)
        assert not list(tmp_path.iterdir())
        return
    report = export(model, path, input_size=size)
    assert report.engine == "ncnn"
    assert [check.shape[0] for check in report.checks] == [1, 5]
    runner = open_exported(path)
    assert error_of(model, runner, images(3, size)) < 1e-4
    assert runner.metadata["name"] == name


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = small()
    path = tmp_path_factory.mktemp("ncnn") / "m.ncnn.param"
    return model, export(model, path, input_size=SIZE, classes=["ant", "bee", "cat"])


def test_three_files_and_what_they_are(exported):
    _, report = exported
    assert sorted(p.name for p in report.path.parent.iterdir()) == FILES
    assert report.bytes == sum(p.stat().st_size for p in report.path.parent.iterdir())
    facts = json.loads((report.path.parent / "m.ncnn.json").read_text())
    assert facts == open_exported(report.path).metadata
    assert facts["classes"] == ["ant", "bee", "cat"]
    assert facts["blobs"] == {"input": "in0", "outputs": ["out0"]}
    assert {"license", "provenance", "arguments"} <= {*facts}


def test_programs_for_phones_take_pixels(exported):
    """By ncnn's own class for pixels and the values of the description, as an app would."""
    model, report = exported
    facts = open_exported(report.path).metadata
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mat = ncnn.Mat.from_pixels(photo, ncnn.Mat.PixelType.PIXEL_RGB, 64, 64)
    mat.substract_mean_normalize(facts["mean_vals"], facts["norm_vals"])
    mean, std = (torch.tensor(facts["input"][n]).view(3, 1, 1) for n in ("mean", "std"))
    x = (torch.from_numpy(photo).permute(2, 0, 1) / 255 - mean) / std
    np.testing.assert_allclose(np.array(mat), x, rtol=1e-4, atol=1e-5)
    expected = outputs(model, x[None])[0]
    np.testing.assert_allclose(in_ncnn(report.path, x, half=False), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_runner_takes_any_number_of_images(exported, count):
    model, report = exported
    assert error_of(model, open_exported(report.path, threads=1), images(count)) < 1e-4


def test_a_fixed_batch(tmp_path):
    model = small()
    report = export(model, tmp_path / "m.param", input_size=SIZE, batch_size=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.ncnn.bin", "m.ncnn.json", "m.param"]
    assert report.dynamic == () and [check.shape for check in report.checks] == [(2, *SIZE)]
    runner = open_exported(report.path)
    assert error_of(model, runner, images(2)) < 1e-4
    with pytest.raises(InputSizeError, match=r"shape \(2, 3, 64, 64\), got \(3,"):
        runner(images(3))


def test_the_maps_of_all_stages_leave_in_order(tmp_path):
    model = small()
    report = export(model, tmp_path / "m.ncnn.param", input_size=(3, 64, 96), features=True)
    x = images(2, (3, 64, 96))
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)
    found = open_exported(report.path)(x)
    assert [f.shape for f in found] == [e.shape for e in expected]
    assert max(float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected)) < 1e-4


def test_weights_in_half_precision(exported, tmp_path):
    model, whole = exported
    report = export(model, tmp_path / "m.ncnn.param", input_size=SIZE, precision="fp16")
    assert report.bytes < 0.6 * whole.bytes
    runner = open_exported(report.path)
    assert runner.precision == "fp16"
    assert 1e-6 < error_of(model, runner, images()) < 5e-3


def test_the_users_model_stays_as_it_is(tmp_path):
    model = small().to(memory_format=torch.channels_last)
    before = {name: (p.clone(), p.stride()) for name, p in model.named_parameters()}
    report = export(model, tmp_path / "m.ncnn.param", input_size=SIZE)
    assert error_of(model, open_exported(report.path), images()) < 1e-4
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.stride() == before[name][1]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dynamic": ("height",)}, "'height' cannot stay free; give input_size"),
        ({"precision": "int8"}, "'ncnn' has no precision 'int8'; it has fp32, fp16"),
        ({"precision": "bf16"}, "'ncnn' has no precision 'bf16'"),
        ({"preprocess": True}, "leave preprocess out: the description beside the file"),
    ],
)
def test_what_cannot_be_leaves_no_file(options, words, tmp_path):
    with pytest.raises(UnsupportedError, match=words):
        export(small(), tmp_path / "m.ncnn.param", input_size=SIZE, **options)
    assert not list(tmp_path.iterdir())


def test_what_computes_something_else_leaves_the_old_files(exported, tmp_path, monkeypatch):
    model, _ = exported
    path = tmp_path / "m.ncnn.param"
    export(model, path, input_size=SIZE)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert sorted(before) == FILES
    other = small()
    torch.nn.init.normal_(other.get_classifier().weight)
    monkeypatch.setattr(converting, "rewrite_for_graphs", lambda *_, **__: other)
    with pytest.raises(ExportError, match="does not compute what the model computes"):
        export(model, path, input_size=SIZE)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_converter_that_fails_says_what_it_said(tmp_path, monkeypatch):
    real = subprocess.run

    def run(command, **options):
        return real(
            [sys.executable, "-c", "print('first'); print('no such thing'); raise SystemExit(3)"],
            **options,
        )

    monkeypatch.setattr(converting.subprocess, "run", run)
    with pytest.raises(ExportError, match=r"m.ncnn.param: pnnx failed \(exit status 3\): no such"):
        export(small(), tmp_path / "m.ncnn.param", input_size=SIZE)
    assert not list(tmp_path.iterdir())


class ChosenSquared(torch.nn.Module):
    """A chosen channel, its square and a use of both."""

    def forward(self, x):
        chosen = x[:, 0]
        return (chosen * chosen).relu() * chosen


def test_pnnx_still_crashes_on_the_square_of_a_choice(tmp_path, monkeypatch):
    """Why products with itself are squares; when this fails, a version has mended it."""
    options = {"input_size": SIZE, "verify": False}
    assert export(ChosenSquared(), tmp_path / "m.ncnn.param", **options).path.is_file()
    monkeypatch.delitem(spelling._SPELLINGS, torch.Tensor.mul)
    with pytest.raises(ExportError, match="pnnx failed"):
        export(ChosenSquared(), tmp_path / "other.ncnn.param", **options)


@pytest.mark.parametrize("lacking", ["bin", "json", "param"])
def test_a_file_without_the_others(exported, lacking, tmp_path):
    for file in exported[1].path.parent.iterdir():
        if file.suffix != f".{lacking}":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(WeightsUnavailableError, match=f"m.ncnn.{lacking}: no such file"):
        open_exported(tmp_path / "m.ncnn.param")


@pytest.mark.parametrize(
    "damaged, content, words",
    [
        ("json", b"{}", "m.ncnn.json: no description of an ncnn file .* it lacks batch, blobs"),
        ("json", b"hello", "m.ncnn.json: no description of an ncnn file"),
        ("param", b"hello, this is no graph", "m.ncnn.param: ncnn cannot load it and m.ncnn.bin"),
        ("bin", b"", "m.ncnn.param: ncnn cannot load it and m.ncnn.bin"),
    ],
)
def test_damaged_files_are_refused(exported, damaged, content, words, tmp_path):
    for file in exported[1].path.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / f"m.ncnn.{damaged}").write_bytes(content)
    with pytest.raises(ExportError, match=words):
        open_exported(tmp_path / "m.ncnn.param")


def test_a_missing_package_names_the_extra(exported, tmp_path, monkeypatch):
    for package in ("ncnn", "pnnx"):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r'pnnx .*"\.\[ncnn\]"'):
        export(small(), tmp_path / "m.ncnn.param", input_size=SIZE)
    assert not list(tmp_path.iterdir())
    with pytest.raises(MissingDependencyError, match=r'ncnn .*"\.\[ncnn\]"'):
        open_exported(exported[1].path)


def test_the_engine_is_started_once(tmp_path, monkeypatch):
    model = small()
    options = {"engine": "ncnn", "input_size": SIZE, "cache_dir": tmp_path}
    runner = deploy(model, threads=1, **options)
    assert (runner.engine, runner.precision, runner.threads) == ("ncnn", "fp32", 1)
    for count in (1, 3):
        assert error_of(model, runner, images(count)) < 1e-4

    def refuse(*_, **__):
        raise AssertionError("nothing is to be exported again")

    monkeypatch.setattr(requesting, "export", refuse)
    again = deploy(model, threads=2, **options)
    assert again.threads == 2
    assert error_of(model, again, images(2)) < 1e-4


def test_the_command(tmp_path, capsys):
    saved = str(save_checkpoint(small(), tmp_path / "m.safetensors"))
    path = tmp_path / "m.ncnn.param"
    options = ["--img-size", "64", "--precision", "fp16", "--json"]
    assert main(["export", saved, str(path), *options]) == 0
    report = json.loads(capsys.readouterr().out)  # the converter prints nothing between
    assert report["format"] == "ncnn" and report["precision"] == "fp16"
    assert in_ncnn(path, images(1)[0]).shape == (3,)


X = images(2, (4, 6, 6))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.mT,
        lambda x: x.flatten(2).view_as(x),
        lambda x: x.clamp_min(0.1),
        lambda x: torch.clamp_min(x, min=0.1),
        lambda x: x.unflatten(1, (2, 2)),
        lambda x: torch.unflatten(x, -1, (3, -1)),
        lambda x: torch.stack(x.unbind(-1)),
        lambda x: torch.stack(torch.unbind(x, dim=1)),
        lambda x: F.normalize(x),
        lambda x: F.normalize(x, dim=-1, eps=3.0),
        lambda x: F.normalize(x, p=1.0, dim=-1),
        lambda x: x * x,
        lambda x: x.mul(x) * 2 + 2 * x,
        lambda x: torch.mul(x, x, out=torch.empty_like(x)),
        lambda x: torch.where(x == x.amax(1, keepdim=True), x, 0),
        lambda x: torch.where(torch.eq(x, x + 1e-7), 2.0, x),
    ],
)
def test_other_words_mean_the_same(call):
    x = X.double()
    expected = call(x)
    with Respelled():
        found = call(x)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
