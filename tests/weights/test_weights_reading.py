"""Reading files: every format, and damage to each; hostile files have a suite of their own."""

from __future__ import annotations

import argparse
import io
import random
import struct
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch

from backbones.errors import CheckpointError
from backbones.weights import read_checkpoint, read_metadata

STATE = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "a.bias": torch.ones(3),
    "n": torch.tensor(3),
}


def assert_state(tensors):
    assert tensors.keys() == STATE.keys()
    assert all(torch.equal(tensors[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth", "m"])
def test_safetensors_by_content(tmp_path, name):
    safetensors.torch.save_file(STATE, tmp_path / name, {"format": "pt"})
    checkpoint = read_checkpoint(tmp_path / name)
    assert_state(checkpoint.tensors)
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.wrapper is None


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["m.pt", "m.bin", "m.pth.tar", "m.safetensors"])
def test_torch_files_by_content(tmp_path, name, zipped):
    arguments = argparse.Namespace(lr=1e-3, betas=[1], dtype=torch.bfloat16)
    content = {"model": OrderedDict(STATE), "epoch": 3, "args": arguments}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(str(tmp_path / name))
    assert_state(checkpoint.tensors)
    assert checkpoint.wrapper == "model"


@pytest.mark.parametrize("zipped", [True, False])
def test_every_number_type(tmp_path, zipped):
    types = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"]
    state = {name: torch.ones(2, 3, dtype=getattr(torch, name)) for name in types}
    state["parameter"] = torch.nn.Parameter(torch.ones(2))
    torch.save(state, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
    tensors = read_checkpoint(tmp_path / "m.pth").tensors
    assert all(torch.equal(tensors[key], state[key]) for key in state)
    assert type(tensors["parameter"]) is torch.Tensor


def test_archive_without_checksums(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "m.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_state(read_checkpoint(tmp_path / "m.pth").tensors)


def test_missing_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such file"):
        read_checkpoint(tmp_path / "nowhere.pth")


def files(folder: Path) -> dict[str, bytes]:
    """One intact file of every format."""
    safetensors.torch.save_file(STATE, folder / "s", {"format": "pt"})
    torch.save({"model": STATE}, folder / "z")
    torch.save({"model": STATE}, folder / "l", _use_new_zipfile_serialization=False)
    return {name: (folder / name).read_bytes() for name in "szl"}


@pytest.mark.parametrize("kind", "szl")
def test_truncation_anywhere(tmp_path, kind):
    content = files(tmp_path)[kind]
    path = tmp_path / "short"
    for length in {*range(1, len(content), max(1, len(content) // 60)), len(content) - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="cut"):
            read_checkpoint(path)


@pytest.mark.parametrize("kind", "szl")
def test_random_damage_is_refused_or_harmless(tmp_path, kind):
    """Only our own errors, whatever byte is wrong, and never other shapes than declared."""
    content = files(tmp_path)[kind]
    rng = random.Random(0)
    path = tmp_path / "damaged"
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 50


def test_flipped_bit_in_an_archive_is_found(tmp_path):
    content = bytearray(files(tmp_path)["z"])
    at = content.index(struct.pack("<f", 11.0))
    content[at] ^= 1
    (tmp_path / "m.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="CRC"):
        read_checkpoint(tmp_path / "m.pth")


def test_repacked_archive(tmp_path):
    """As Python's zipfile and the command `zip -0 -r -D` write it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(files(tmp_path)["z"])) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    (tmp_path / "m.pth").write_bytes(out.getvalue())
    assert_state(read_checkpoint(tmp_path / "m.pth").tensors)


def test_content_of_a_training_checkpoint(tmp_path):
    """Everything that trainers keep beside the weights and that needs no code."""
    described = OrderedDict(STATE)
    described._metadata = OrderedDict({"": {"version": 1}})
    content = {
        "state_dict": described,
        "args": argparse.Namespace(
            betas=(0.9, 0.999), names={"a", "b"}, device=torch.device("cpu")
        ),
        "scheduler": {"milestones": Counter([30, 60]), "last": 1e-3, "none": None, "big": 1 << 70},
        "shape": torch.Size([1, 2]),
        "grouped": {(1, "a"): 1j, 0.5: [True, ()]},
        "parameters": [torch.nn.Parameter(torch.ones(2), requires_grad=False)],
    }
    for zipped in (True, False):
        torch.save(content, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
        assert_state(read_checkpoint(tmp_path / "m.pth").tensors)


def test_shared_and_strided_tensors(tmp_path):
    """Views, ties and other memory layouts lie in one storage."""
    base = torch.arange(24.0)
    state = {
        "a": base[4:8],
        "b": base.view(2, 3, 2, 2).to(memory_format=torch.channels_last),
        "c": base.view(4, 6).t(),
        "tied": base,
        "row": torch.ones(3, 1).expand(3, 4),
        "none": torch.zeros(0, 3),
        "short": torch.ones(2, dtype=torch.uint16),
    }
    for zipped in (True, False):
        if not zipped:
            del state["short"]  # PyTorch does not read the newer types back from the old format
        torch.save(state, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
        tensors = read_checkpoint(tmp_path / "m.pth").tensors
        assert tensors.keys() == state.keys()
        assert all(torch.equal(tensors[key], value) for key, value in state.items())


def test_metadata_needs_the_header_only(tmp_path):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(STATE, path, {"format": "pt", "backbones": '{"name": "x"}'})
    assert read_metadata(path) == {"format": "pt", "backbones": {"name": "x"}}
    for text in ("{", "[1]"):
        safetensors.torch.save_file(STATE, path, {"backbones": text})
        with pytest.raises(CheckpointError, match="no JSON"):
            read_metadata(path)
    torch.save(STATE, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="only safetensors"):
        read_metadata(tmp_path / "m.pth")
