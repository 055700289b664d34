"""``backbones weights convert`` and ``push``: what they write, refuse and leave behind."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import tempfile
from pathlib import Path

import pytest
import timm
import torch
from golden import FOLDER, Golden, assert_logits

import backbones
from backbones.cli import main
from backbones.manifest import load_manifest
from backbones.weights import read_checkpoint, read_metadata
from backbones.weights.publish.pushing import FILES

SHAPE = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
MINE = "family: convnext\nvariants:\n  mine: {like: convnext_atto, depths: [1, 1, 1, 1]"
MINE += ", dims: [8, 16, 24, 32]}\n"


def filled(name, **arguments):
    torch.manual_seed(1)
    model = backbones.create_model(str(name), **arguments).eval()
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(value + 0.1 * torch.rand_like(value))
    return model


def logits(model):
    torch.manual_seed(2)
    with torch.no_grad():
        return model.eval()(torch.randn(2, model.in_chans, 64, 64))


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    return str(path)


@pytest.fixture
def saved(tmp_path):
    """A file of this package's, with everything it may say of itself."""
    model = filled("convnext_atto", num_classes=3, in_chans=1, **SHAPE)
    model.pretrained_cfg["input_size"] = (1, 48, 48)
    path = tmp_path / "saved.safetensors"
    backbones.save_checkpoint(
        model, path, license="mit", classes=["a", "b", "c"], provenance={"data": "mine"}
    )
    return model, str(path)


def converted(capsys, *argv):
    assert main(["weights", "convert", *map(str, argv), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def fails(capsys, code, *argv):
    """Run a command that must fail with one message, print nothing else and leave nothing."""
    before = sorted(os.listdir(Path(argv[1]).parent))
    assert main(["weights", *map(str, argv)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert sorted(os.listdir(Path(argv[1]).parent)) == before
    return captured.err


def test_authors_file_in_a_wrapper(capsys, tmp_path):
    """Authors' names, wrapped and prefixed, become a file that computes what the authors' does."""
    golden = Golden(FOLDER / "lsnet_t.json.gz")
    source, out = tmp_path / "lsnet_t.pth", tmp_path / "out.safetensors"
    theirs = {f"module.{key}": value for key, value in golden.checkpoint().items()}
    torch.save({"model": theirs, "epoch": 3}, source)
    facts = converted(capsys, source, out, "--name", "lsnet_t.in1k")
    entry = load_manifest().find("lsnet_t", "in1k")
    assert (facts["layout"], facts["wrapper"], facts["dtype"]) == ("authors", "model", "float64")
    assert facts["license"] == entry.license
    assert facts["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    ours = read_metadata(out)["backbones"]
    assert (ours["name"], ours["license"]) == ("lsnet_t", entry.license)
    assert ours["provenance"] == {
        "converted from": "lsnet_t.pth",
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "size": source.stat().st_size,
        "layout": "authors",
        "wrapper": "model",
        "prefix": "module.",
        "by": f"backbones {backbones.__version__}",
        "release": "lsnet_t.in1k",
        "released at": entry.source,
    }
    assert ours["input"]["input_size"] == list(entry.input_size)
    loaded = backbones.create_model("lsnet_t", checkpoint_path=out, dtype=torch.float64).eval()
    with torch.no_grad():
        assert_logits(loaded(golden.input_tensor()), golden)


def test_what_a_file_of_ours_says_is_kept(capsys, tmp_path, saved):
    model, path = saved
    out = tmp_path / "out.safetensors"
    facts = converted(capsys, path, out, "--dtype", "bfloat16")
    assert (facts["model"], facts["dtype"]) == ("convnext_atto", "bfloat16")
    old, new = (read_metadata(file)["backbones"] for file in (path, out))
    for key in ("name", "arguments", "license", "classes", "input", "deploy"):
        assert new[key] == old[key], key
    assert new["provenance"]["before"] == {"data": "mine"}
    tensors = read_checkpoint(out).tensors
    for key, value in model.state_dict().items():
        assert tensors[key].dtype == torch.bfloat16
        assert torch.equal(tensors[key], value.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_of_the_file_is_kept(capsys, tmp_path, mine, dtype):
    torch.save(filled(mine).to(dtype).state_dict(), tmp_path / "in.pt")
    out = tmp_path / "out.safetensors"
    facts = converted(capsys, tmp_path / "in.pt", out, "--name", mine)
    assert facts["dtype"] == str(dtype).removeprefix("torch.")
    assert {tensor.dtype for tensor in read_checkpoint(out).tensors.values()} == {dtype}
    assert facts["license"] == "unstated"


def test_several_types_in_a_file_become_the_one_that_holds_all(capsys, tmp_path, mine):
    tensors = filled(mine).state_dict()
    tensors = {k: v.half() if "norm" in k else v.bfloat16() for k, v in tensors.items()}
    torch.save(tensors, tmp_path / "in.pt")
    out = tmp_path / "out.safetensors"
    assert converted(capsys, tmp_path / "in.pt", out, "--name", mine)["dtype"] == "float32"
    for key, value in read_checkpoint(out).tensors.items():
        assert torch.equal(value, tensors[key].float())


def test_eight_bits_become_sixteen(capsys, tmp_path, mine):
    tensors = {k: v.to(torch.float8_e4m3fn) for k, v in filled(mine).state_dict().items()}
    torch.save(tensors, tmp_path / "in.pt")
    out = tmp_path / "out.safetensors"
    assert converted(capsys, tmp_path / "in.pt", out, "--name", mine)["dtype"] == "float16"
    for key, value in read_checkpoint(out).tensors.items():
        assert torch.equal(value.float(), tensors[key].float())


def test_timms_file_with_other_classes_and_channels(capsys, tmp_path):
    model = timm.create_model("convnext_atto", num_classes=7, in_chans=1)
    torch.save(model.state_dict(), tmp_path / "in.pt")
    convert = ["convert", tmp_path / "in.pt", tmp_path / "out.safetensors"]
    message = fails(capsys, 2, *convert, "--name", "convnext_atto", "--num-classes", "8")
    assert "in.pt" in message
    assert "num_classes=8 was asked for, the file has 7" in message
    message = fails(capsys, 2, *convert, "--name", "convnext_atto", "--in-chans", "3")
    assert "in_chans=3 was asked for, the file has 1" in message
    out = tmp_path / "out.safetensors"
    argv = ["--name", "convnext_atto", "--num-classes", "7", "--in-chans", "1"]
    converted(capsys, tmp_path / "in.pt", out, *argv, "--license", "mit")
    loaded = backbones.create_model("convnext_atto", checkpoint_path=out)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-6)
    assert read_metadata(out)["backbones"]["license"] == "mit"


def test_a_release_without_classifier(capsys, tmp_path):
    """The tag says what the file lacks; nothing random is written in its place."""
    tag = "convnextv2_atto.fcmae"
    entry = load_manifest().entries[tag]
    assert entry.lacks == ["head"]
    model = filled("convnextv2_atto")
    tensors = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    torch.save(tensors, tmp_path / "in.pt")
    out = tmp_path / "out.safetensors"
    facts = converted(capsys, tmp_path / "in.pt", out, "--name", tag)
    assert facts["license"] == entry.license
    found = read_checkpoint(out).tensors
    assert {k for k in found if k.startswith("head.")} == {"head.norm.weight", "head.norm.bias"}
    assert torch.equal(found["head.norm.weight"], torch.ones(320))
    assert all(torch.equal(found[key], value) for key, value in tensors.items())
    assert read_metadata(out)["backbones"]["provenance"]["lacks"] == ["head"]
    message = fails(
        capsys,
        2,
        "convert",
        tmp_path / "in.pt",
        tmp_path / "b.safetensors",
        "--name",
        "convnextv2_atto",
    )
    assert "missing" in message


def test_a_deploy_form_stays_one(capsys, tmp_path, saved):
    merged = backbones.reparameterize(saved[0])
    path = backbones.save_checkpoint(merged, tmp_path / "deploy.safetensors")
    out = tmp_path / "out.safetensors"
    converted(capsys, path, out)
    assert read_metadata(out)["backbones"]["deploy"]
    loaded = backbones.create_model("convnext_atto", checkpoint_path=out, deploy=True)
    assert torch.equal(logits(loaded), logits(merged))


def test_printed_for_people(capsys, tmp_path, saved):
    out = tmp_path / "out.safetensors"
    assert main(["weights", "convert", saved[1], str(out)]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["path"] == str(out)
    assert (lines["dtype"], lines["license"], lines["layout"]) == ("float32", "mit", "backbones")
    assert "wrapper" not in lines


def test_refusals_leave_nothing(capsys, tmp_path, saved, mine):
    _, path = saved
    plain = tmp_path / "plain.pt"
    torch.save(filled(mine).state_dict(), plain)
    out = tmp_path / "out.safetensors"
    convert = ["convert", path, out]
    assert "no such file" in fails(capsys, 2, "convert", tmp_path / "no.pt", out)
    assert "no such file" in fails(capsys, 2, "convert", tmp_path / "no.pt", path)
    assert "would replace its own source" in fails(capsys, 2, "convert", path, path)
    assert "add --name NAME" in fails(capsys, 2, "convert", plain, out)
    assert "no model of this package 'resnet18'" in fails(capsys, 2, *convert, "--name", "resnet18")
    message = fails(capsys, 2, *convert, "--name", "convnext_atto.d2")
    assert "no weights 'convnext_atto.d2' (tags of convnext_atto: d2_in1k)" in message
    assert "does not fit convnext_tiny" in fails(capsys, 2, *convert, "--name", "convnext_tiny")
    assert "name it *.safetensors" in fails(capsys, 2, "convert", path, tmp_path / "out.pt")
    assert "does not exist" in fails(capsys, 2, "convert", path, tmp_path / "no" / "o.safetensors")
    tag = ["--name", "convnext_atto.d2_in1k", "--license", "mit"]
    message = fails(capsys, 2, *convert, *tag)
    assert "convnext_atto.d2_in1k was released under apache-2.0" in message
    huge = {key: value * 1e6 for key, value in filled(mine).state_dict().items()}
    torch.save(huge, plain)
    message = fails(capsys, 2, "convert", plain, out, "--name", mine, "--dtype", "float16")
    assert "values too large for torch.float16" in message


def test_a_full_disk_keeps_the_old_file(capsys, tmp_path, saved):
    out = tmp_path / "out.safetensors"
    out.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        assert "cannot be written" in fails(capsys, 2, "convert", saved[1], out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert out.read_text() == "old"


def test_dry_run_shows_what_would_be_sent(capsys, monkeypatch, tmp_path, saved):
    model, path = saved
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(["weights", "push", path, "me/digits", "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    folder = Path(facts["folder"])
    assert folder.parent == tmp_path
    assert facts["would go to"] == "me/digits"
    assert facts["files"] == {name: (folder / name).stat().st_size for name in FILES}
    for create in (timm.create_model, backbones.create_model):
        loaded = create(f"local-dir:{folder}", pretrained=True)
        assert torch.equal(logits(loaded), logits(model))
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert "hf-hub:me/digits" in card
    assert '    "data": "mine"' in card
    assert json.loads((folder / "config.json").read_text())["label_names"] == ["a", "b", "c"]
    ours = read_metadata(folder / "model.safetensors")["backbones"]
    assert ours["provenance"] == {"data": "mine"}
    assert ours["input"]["input_size"] == [1, 48, 48]


def test_push_refuses_before_it_sends(capsys, saved):
    _, path = saved
    assert "name it as owner/name" in fails(capsys, 2, "push", path, "mine", "--dry-run")
    assert "no such file" in fails(capsys, 2, "push", path + "x", "me/mine")
    assert "HF_HUB_OFFLINE forbids" in fails(capsys, 1, "push", path, "me/mine")


@pytest.mark.parametrize("verb", ["convert", "push"])
def test_help_shows_an_example(capsys, verb):
    with pytest.raises(SystemExit) as end:
        main(["weights", verb, "--help"])
    assert end.value.code == 0
    assert f"example: backbones weights {verb}" in capsys.readouterr().out
