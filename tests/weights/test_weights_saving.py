"""Saving: round trips, metadata, and files that appear whole or not at all."""

from __future__ import annotations

import os
import resource
import stat

import pytest
import safetensors
import torch
from torch import nn
from weights_toy import Getter, Toy, assert_same, filled, snapshot

from backbones.errors import CheckpointError
from backbones.weights import load_checkpoint, read_metadata, save_checkpoint


def model() -> Toy:
    toy = Toy()
    load_checkpoint(toy, filled())
    return toy


def test_round_trip(tmp_path):
    saved = model()
    path = save_checkpoint(saved, str(tmp_path / "m.safetensors"))
    assert path == tmp_path / "m.safetensors"
    assert os.listdir(tmp_path) == ["m.safetensors"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o400
    other = Toy()
    load_checkpoint(other, path)
    assert_same(other, snapshot(saved))


def tied(toy):
    toy.stages[1][1].conv = toy.stages[0][1].conv
    return toy


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.half(),
        lambda m: m.double(),
        tied,
        lambda m: torch.compile(m, backend="eager"),
        nn.DataParallel,
        lambda m: m.requires_grad_(False),
    ],
)
def test_every_form_can_be_saved(tmp_path, change):
    inner = model()
    saved = change(inner)
    path = save_checkpoint(saved, tmp_path / "m.safetensors")
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == set(inner.state_dict())
    other = Toy().to(next(inner.parameters()).dtype)
    load_checkpoint(other, path)
    assert_same(other, {k: v.contiguous() for k, v in snapshot(inner).items()})


def test_features_only(tmp_path):
    saved = Getter(model())
    path = save_checkpoint(saved, tmp_path / "m.safetensors")
    other = Getter(Toy())
    load_checkpoint(other, path)
    assert_same(other, snapshot(saved))


def test_metadata(tmp_path):
    saved = model()
    saved.pretrained_cfg = {
        "url": "https://example.org/x",
        "license": "mit",
        "num_classes": 5,
        "input_size": (3, 96, 96),
        "mean": (0.5, 0.5, 0.5),
        "interpolation": "bicubic",
    }
    path = save_checkpoint(
        saved, tmp_path / "m.safetensors", provenance={"source": "x.pth"}, classes=["a", "b"]
    )
    assert read_metadata(path) == {
        "format": "pt",
        "backbones": {
            "name": "toy_t",
            "family": None,
            "arguments": {"dim": 4},
            "deploy": False,
            "license": "mit",
            "provenance": {"source": "x.pth"},
            "classes": ["a", "b"],
            "input": {
                "num_classes": 5,
                "input_size": [3, 96, 96],
                "interpolation": "bicubic",
                "mean": [0.5, 0.5, 0.5],
            },
        },
    }
    saved.deployed = True
    save_checkpoint(saved, path, license="cc-by-4.0")
    ours = read_metadata(path)["backbones"]
    assert (ours["deploy"], ours["license"]) == (True, "cc-by-4.0")


def test_input_of_the_model_itself(tmp_path):
    """Not of the weights it was created from, with other channels and classes."""
    saved = model()
    cfg = {"num_classes": 1000, "input_size": (3, 96, 96), "test_input_size": (3, 128, 128)}
    saved.pretrained_cfg = cfg | {"mean": (0.25, 0.5, 0.75), "std": (0.5,)}
    saved.num_classes, saved.in_chans = 5, 2
    path = save_checkpoint(saved, tmp_path / "m.safetensors", classes=list("abcde"))
    assert read_metadata(path)["backbones"]["input"] == {
        "num_classes": 5,
        "input_size": [2, 96, 96],
        "test_input_size": [2, 128, 128],
        "mean": [0.5, 0.5],
        "std": [0.5, 0.5],
    }
    with pytest.raises(CheckpointError, match=r"m.safetensors: 2 names for 5 classes"):
        save_checkpoint(saved, path, classes=["a", "b"])


def test_equal_models_give_equal_files(tmp_path):
    facts = {"provenance": {"source": 'Ünïcode \x07 " \\', "size": 3}, "license": "mit"}
    paths = [save_checkpoint(model(), tmp_path / f"{i}.safetensors", **facts) for i in range(12)]
    assert len({path.read_bytes() for path in paths}) == 1
    assert read_metadata(paths[0])["backbones"]["provenance"] == facts["provenance"]


def on_meta():
    with torch.device("meta"):
        return Toy()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("m.pth", {}, "name it"),
        ("no/such/m.safetensors", {}, "does not exist"),
        ("folder.safetensors", {}, "is a folder"),
        ("m.safetensors", {"provenance": {"x": object()}}, "no JSON"),
        ("m.safetensors", {"provenance": {"x": float("nan")}}, "no JSON"),
    ],
)
def test_refusals_leave_nothing(tmp_path, name, options, message):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=message) as caught:
        save_checkpoint(model(), tmp_path / name, **options)
    assert name in str(caught.value)
    assert os.listdir(tmp_path) == ["folder.safetensors"]


def test_meta_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="meta device"):
        save_checkpoint(on_meta(), tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == []


def test_full_disk_keeps_the_old_file(tmp_path):
    """The limit on file sizes stands for the full disk: the write fails half-way."""
    path = save_checkpoint(model(), tmp_path / "m.safetensors")
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match=r"m.safetensors: cannot be written"):
            save_checkpoint(Toy(dim=64), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["m.safetensors"]
    assert path.read_bytes() == old


def test_failing_last_step_leaves_nothing(tmp_path):
    """The file is written, but cannot get its name."""
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(model(), tmp_path / ("m" * 300 + ".safetensors"))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_checkpoint(model(), tmp_path / "m.safetensors")
    finally:
        tmp_path.chmod(0o700)
    assert os.listdir(tmp_path) == []


def test_file_has_the_rights_of_any_new_file(tmp_path):
    path = save_checkpoint(model(), tmp_path / "m.safetensors")
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
