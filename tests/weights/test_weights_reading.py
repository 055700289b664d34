"""Reading files: every format, and every kind of file that must be refused."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch

from backbones.errors import CheckpointError, UnsafeCheckpointError
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


NOT_CHECKPOINTS = {
    "empty": (b"", "empty"),
    "web page": (b"\n<!DOCTYPE html><html>404</html>", "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
    "gzip": (b"\x1f\x8b\x08\x00rest", "gzip"),
    "numpy": (b"\x93NUMPY\x01\x00", "NumPy"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "Keras"),
    "text": (b"hello", "neither safetensors nor"),
    "zeros": (bytes(4096), "neither safetensors nor"),
    "not torch's pickle": (pickle.dumps({"a": 1}), "plain pickle"),
}


@pytest.mark.parametrize("kind", NOT_CHECKPOINTS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_no_checkpoint(tmp_path, kind, suffix):
    content, message = NOT_CHECKPOINTS[kind]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)


def test_folder_and_device_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="a folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no regular file"):
        read_checkpoint("/dev/zero")


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


# Pickles that carry code.


class Call:
    """Unpickles to a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Stateful:
    """Unpickles by calling __setstate__ of a class that is not allowed."""

    def __init__(self, inner):
        self.inner = inner


def positions(code):
    return {
        "top": code,
        "value": {"state_dict": STATE, "epoch": code},
        "first": {"a": code, "state_dict": STATE},
        "in state dict": {"state_dict": {**STATE, "b": code}},
        "key": {(1, code): 2, "state_dict": STATE},
        "list": {"state_dict": STATE, "args": [1, [code]]},
        "namespace": {"state_dict": STATE, "args": argparse.Namespace(x=code)},
        "object state": {"state_dict": STATE, "x": Stateful(code)},
    }


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle2", "pickle4", "pickle5"])
@pytest.mark.parametrize("position", positions(None))
def test_code_is_refused_named_and_never_run(tmp_path, position, form):
    mark = tmp_path / "mark"
    content = positions(Call(os.mkdir, str(mark)))[position]
    path = tmp_path / "evil.pth"
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UnsafeCheckpointError) as caught:
        read_checkpoint(path)
    assert f"{os.mkdir.__module__}.mkdir" in str(caught.value)
    assert str(path) in str(caught.value)
    assert not mark.exists()
    # The file does carry working code: a reader that trusts it runs it.
    if form.startswith("pickle"):
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("protocol", [0, 1])
def test_old_pickles_with_code_are_never_run(tmp_path, protocol):
    mark = tmp_path / "mark"
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Call(os.mkdir, str(mark)), protocol))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "evil.pth")
    assert not mark.exists()


@pytest.mark.parametrize(("function", "argument"), [(bytearray, 1 << 45), (torch.Tensor, 1 << 45)])
def test_calls_that_only_take_memory_are_refused(tmp_path, function, argument):
    """PyTorch's own list allows these."""
    torch.save({"state_dict": STATE, "x": Call(function, argument)}, tmp_path / "m.pth")
    with pytest.raises(UnsafeCheckpointError, match=function.__name__):
        read_checkpoint(tmp_path / "m.pth")


def test_expanded_tensor_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="more values than the file holds"):
        read_checkpoint(tmp_path / "m.pth")


# Archives.


def repacked(content: bytes, *, rename=None, extra=(), compress=zipfile.ZIP_STORED) -> bytes:
    """The archive with members renamed, compressed or added."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", compress) as new:
        for member in old.infolist():
            name = rename(member.filename) if rename else member.filename
            new.writestr(name, old.read(member))
        for name, data in extra:
            new.writestr(name, data)
    return out.getvalue()


@pytest.mark.parametrize(
    ("trick", "message"),
    [
        ({"extra": [("z/../../etc/passwd", b"x")]}, "odd path"),
        ({"extra": [("/z/x", b"x")]}, "odd path"),
        ({"extra": [("z\\x", b"x")]}, "odd path"),
        ({"extra": [("z/DATA.pkl", b"x")]}, "twice"),
        ({"extra": [("other/x", b"x")]}, "no checkpoint of torch.save"),
        ({"extra": [("z/constants.pkl", b"x")]}, "a TorchScript archive; save"),
        ({"compress": zipfile.ZIP_DEFLATED}, "compressed"),
        ({"rename": lambda name: name.replace("data.pkl", "x.pkl")}, "no checkpoint of torch.save"),
    ],
)
def test_odd_archives_are_refused(tmp_path, trick, message):
    content = files(tmp_path)["z"]
    (tmp_path / "m.pth").write_bytes(repacked(content))
    assert_state(read_checkpoint(tmp_path / "m.pth").tensors)
    (tmp_path / "m.pth").write_bytes(repacked(content, **trick))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "m.pth")


def test_archive_bomb_is_refused(tmp_path):
    """Members that share their bytes declare more than the file has."""
    content = bytearray(files(tmp_path)["z"])
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        victim = next(m for m in archive.infolist() if m.filename.endswith("data/0"))
    at = content.rindex(victim.filename.encode()) - 46
    content[at + 20 : at + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    (tmp_path / "m.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="declare"):
        read_checkpoint(tmp_path / "m.pth")


def test_storage_larger_than_the_file_is_refused(tmp_path):
    """The pickle, not the archive, says how long a storage is."""
    torch.save({"model": {"a": torch.ones(1000)}}, tmp_path / "z")
    content = (tmp_path / "z").read_bytes()
    pickled = zipfile.ZipFile(io.BytesIO(content)).read("z/data.pkl")
    lying = pickled.replace(b"M\xe8\x03", b"J\xe8\x03\x00\x40")
    assert lying != pickled
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.infolist():
            new.writestr(member, lying if "data.pkl" in member.filename else old.read(member))
    (tmp_path / "m.pth").write_bytes(out.getvalue())
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "m.pth")


# Safetensors headers that lie.

TENSOR = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def safetensors_bytes(header, data=bytes(16), length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


LIES = {
    "length beyond the file": safetensors_bytes({"a": TENSOR}, length=1 << 20),
    "length of terabytes": safetensors_bytes({"a": TENSOR}, length=1 << 42),
    "length of many MiB": safetensors_bytes(json.dumps({"a": TENSOR}).encode() + b" " * (9 << 20)),
    "length negative": safetensors_bytes({"a": TENSOR}, length=(1 << 64) - 1),
    "no JSON": safetensors_bytes(b"{'a': 1}"),
    "no UTF-8": safetensors_bytes(b'{"\xff": 1}'),
    "deep nesting": safetensors_bytes(b'{"a":' + b"[" * 200_000 + b"}"),
    "key twice": safetensors_bytes(b'{"a":%s,"a":%s}' % ((json.dumps(TENSOR).encode(),) * 2)),
    "entry no object": safetensors_bytes({"a": [1]}),
    "field missing": safetensors_bytes({"a": {"dtype": "F32", "shape": [2, 2]}}),
    "field too many": safetensors_bytes({"a": {**TENSOR, "x": 1}}),
    "dtype unknown": safetensors_bytes({"a": {**TENSOR, "dtype": "F33"}}),
    "dtype wrong": safetensors_bytes({"a": {**TENSOR, "dtype": "F64"}}),
    "dtype no string": safetensors_bytes({"a": {**TENSOR, "dtype": ["F32"]}}),
    "shape wrong": safetensors_bytes({"a": {**TENSOR, "shape": [2, 3]}}),
    "shape negative": safetensors_bytes({"a": {**TENSOR, "shape": [-2, -2]}}),
    "shape fractional": safetensors_bytes({"a": {**TENSOR, "shape": [2.0, 2]}}),
    "shape boolean": safetensors_bytes({"a": {**TENSOR, "shape": [True, 4]}}),
    "shape overflowing": safetensors_bytes(
        {"a": {**TENSOR, "shape": [1 << 40, 1 << 40], "data_offsets": [0, 1 << 82]}}
    ),
    "shape of many dimensions": safetensors_bytes({"a": {**TENSOR, "shape": [1] * 50 + [4]}}),
    "offsets reversed": safetensors_bytes({"a": {**TENSOR, "data_offsets": [16, 0]}}),
    "offsets negative": safetensors_bytes({"a": {**TENSOR, "data_offsets": [-16, 0]}}),
    "offsets three": safetensors_bytes({"a": {**TENSOR, "data_offsets": [0, 16, 32]}}),
    "out of range": safetensors_bytes({"a": {**TENSOR, "data_offsets": [1 << 30, (1 << 30) + 16]}}),
    "overlap": safetensors_bytes(
        {"a": TENSOR, "b": {**TENSOR, "data_offsets": [8, 24]}}, bytes(24)
    ),
    "same bytes": safetensors_bytes({"a": TENSOR, "b": TENSOR}),
    "gap": safetensors_bytes({"a": {**TENSOR, "data_offsets": [4, 20]}}, bytes(20)),
    "bytes at the end": safetensors_bytes({"a": TENSOR}, bytes(20)),
    "metadata no strings": safetensors_bytes({"__metadata__": {"x": 1}, "a": TENSOR}),
    "metadata no object": safetensors_bytes({"__metadata__": [1], "a": TENSOR}),
    "no tensors": safetensors_bytes({}, b""),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_header(tmp_path, lie):
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_bytes({"a": TENSOR}))
    assert read_checkpoint(path).tensors["a"].shape == (2, 2)
    path.write_bytes(LIES[lie])
    with pytest.raises(CheckpointError, match=r"damaged or forged|holds no tensors") as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000


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
