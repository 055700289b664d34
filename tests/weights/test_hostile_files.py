"""Hostile files: each is refused for what it is, at once, and the model stays as it was.

Every file would load into the model but for the one thing that is wrong with it.
"""

from __future__ import annotations

import argparse
import copyreg
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest
import safetensors.torch
import torch
from hostile_pickles import (
    Member,
    archive,
    call,
    items,
    legacy,
    mapping,
    members,
    name,
    number,
    program,
    safetensors_bytes,
    storage,
    tensor,
    text,
    written,
)
from torch import nn
from weights_toy import assert_same, snapshot

import backbones
from backbones.errors import CheckpointError, ConfigError, UnsafeCheckpointError

SECONDS = 20
"""What any file may take; nearly all take milliseconds."""
ROOM = 600 << 20
"""Bytes that reading any of the files may add to the process."""

Builder = Callable[[Path], bytes]
HOSTILE: dict[str, tuple[str, Builder]] = {}
"""The message expected of each file, and what writes it; a folder is there for its scratch."""


class Single(nn.Module):
    """One parameter of four numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(4))


STATE = {"a": torch.arange(4.0)}
GOOD = mapping({"a": tensor()})
OLD_STORAGE = storage(view=b"N")
OLD_GOOD = mapping({"a": tensor(block=OLD_STORAGE)})
ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def case(label: str, message: str, build: Builder | bytes) -> None:
    assert label not in HOSTILE
    HOSTILE[label] = (message, build if callable(build) else lambda folder: build)


def saved(content: object, **options: object) -> Builder:
    def build(folder: Path) -> bytes:
        buffer = io.BytesIO()
        made = content(folder) if isinstance(content, FunctionType) else content
        torch.save(made, buffer, **options)
        return buffer.getvalue()

    return build


def pickled(body: bytes) -> bytes:
    """An archive around a pickle."""
    return archive(members(program(body)))


# No checkpoint at all.

case("empty file", "the file is empty", b"")
case("web page", "a web page", b"\n<!DOCTYPE html><html>404</html>")
case("git lfs pointer", "git lfs pull", b"version https://git-lfs.github.com/spec/v1\nsize 5\n")
case("gzip", "a gzip archive", b"\x1f\x8b\x08\x00rest")
case("tar archive", "a tar archive", b"sys_info".ljust(257, b"\0") + b"ustar\x0000" + bytes(512))
case("hdf5", "Keras", b"\x89HDF\r\n\x1a\n")
case("numpy array", "a NumPy array", b"\x93NUMPY\x01\x00")
case("text", "neither safetensors nor", b"hello")
case("zeros", "neither safetensors nor", bytes(4096))
case("plain pickle", "a plain pickle", pickle.dumps({"a": 1}))
case("old plain pickle", "neither safetensors nor", pickle.dumps({"a": 1}, 0))
case("cut inside the magic", "cut short", lambda folder: legacy(program(OLD_GOOD))[:9])
for part in (0.1, 0.5, 0.9):
    for kind, whole in (("archive", pickled(GOOD)), ("legacy", legacy(program(OLD_GOOD)))):
        case(f"{kind} cut at {part}", "cut short", whole[: int(len(whole) * part)])

# Code, in every position a file has, and in every way a pickle can call it.


class Call:
    """Unpickles to a call of `function`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


class Stateful:
    """Unpickles by setting the attributes of a class that is on no list."""

    def __init__(self, inner: object) -> None:
        self.inner = inner


class WithState(Stateful):
    def __setstate__(self, state: object) -> None:
        raise AssertionError("was run")


def positions(code: object) -> dict[str, object]:
    attributed = nn.Parameter(torch.ones(4))
    attributed.note = code  # type: ignore[attr-defined]
    described = OrderedDict(STATE)
    described._metadata = OrderedDict(a=code)  # type: ignore[attr-defined]
    return {
        "top": code,
        "value": {"state_dict": STATE, "epoch": code},
        "first": {"b": code, "state_dict": STATE},
        "in the state dict": {"state_dict": {**STATE, "b": code}},
        "in nested wrappers": {"model": {"module": {"state_dict": {"b": code, **STATE}}}},
        "key": {(1, code): 2, "state_dict": STATE},
        "list": {"state_dict": STATE, "args": [1, [code]]},
        "namespace": {"state_dict": STATE, "args": argparse.Namespace(x=code)},
        "object state": {"state_dict": STATE, "x": Stateful(code)},
        "setstate": {"state_dict": STATE, "x": WithState(code)},
        "attribute of a parameter": {"a": attributed},
        "metadata of a state dict": described,
        "optimizer": {"model": STATE, "optimizer": {"state": {0: {"step": code}}}},
    }


FORMS: dict[str, dict[str, object]] = {
    "zip": {},
    "zip of protocol 4": {"pickle_protocol": 4},
    "legacy": {"_use_new_zipfile_serialization": False},
}
for form, options in FORMS.items():
    for place in positions(None):
        case(
            f"code: {place}, {form}",
            r"would call .*posix\.mkdir|would call .*nt\.mkdir|WithState",
            saved(
                lambda folder, p=place: positions(Call(os.mkdir, str(folder / "mark")))[p],
                **options,
            ),
        )


def mark(folder: Path) -> bytes:
    return text(str(folder / "mark"))


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


MKDIR = f"{os.mkdir.__module__}.mkdir"
SYSTEM, FUNCTION = MKDIR.split(".")
# How the function comes onto the stack, and the argument after it; each ends in a call.
CALLS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "GLOBAL": (MKDIR, lambda arg: name(SYSTEM, FUNCTION) + arg + b"\x85R"),
    "INST": (MKDIR, lambda arg: b"(" + arg + f"i{SYSTEM}\n{FUNCTION}\n".encode()),
    "OBJ": (MKDIR, lambda arg: b"(" + name(SYSTEM, FUNCTION) + arg + b"o"),
    "STACK_GLOBAL": (MKDIR, lambda arg: short(SYSTEM) + short(FUNCTION) + b"\x93" + arg + b"\x85R"),
    "STACK_GLOBAL from the memo": (
        MKDIR,
        lambda arg: short(SYSTEM) + b"\x94" + short(FUNCTION) + b"\x94" + short("collections")
        + short("OrderedDict") + b"000" + b"0" + b"h\x00h\x01\x93" + arg + b"\x85R",
    ),
    # The last two texts are those of a harmless class, but not what is on the stack.
    "STACK_GLOBAL behind a decoy": (
        r"\?",
        lambda arg: short(SYSTEM) + short(FUNCTION) + short("collections") + short("OrderedDict")
        + b"00\x93" + arg + b"\x85R",
    ),
    "STACK_GLOBAL with a decoy in the memo": (
        r"\?",
        lambda arg: short(SYSTEM) + b"q\x00" + short("collections") + b"q\x010"
        + b"0h\x00" + short("x") + b"0" + short(FUNCTION) + b"\x93" + arg + b"\x85R",
    ),
    "STACK_GLOBAL with the memo written twice": (
        MKDIR,
        lambda arg: short("collections") + b"q\x000" + short(SYSTEM) + b"q\x000"
        + b"h\x00" + short(FUNCTION) + b"\x93" + arg + b"\x85R",
    ),
    "STACK_GLOBAL through a copy": (
        r"\?",
        lambda arg: short(FUNCTION) + b"q\x050" + short(SYSTEM) + b"20h\x05\x93" + arg + b"\x85R",
    ),
    "STACK_GLOBAL of long strings": (
        MKDIR,
        lambda arg: b"\x8d" + struct.pack("<Q", len(SYSTEM)) + SYSTEM.encode() + text(FUNCTION)
        + b"\x93" + arg + b"\x85R",
    ),
    "EXT": ("copyreg extension 240", lambda arg: b"\x82\xf0" + arg + b"\x85R"),
    "getattr": ("builtins.getattr", lambda arg: call(
        call(name("builtins", "getattr"), name("os", "path"), text("os")), arg)),
    "Python 2's name": ("builtins.eval", lambda arg: call(name("__builtin__", "eval"), text("1"))),
    "NEWOBJ": ("subprocess.Popen", lambda arg: name("subprocess", "Popen") + arg + b"\x85\x81"),
    "NEWOBJ_EX": (
        "subprocess.Popen", lambda arg: name("subprocess", "Popen") + arg + b"\x85}\x92"
    ),
    "BUILD": (
        "subprocess.Popen",
        lambda arg: name("subprocess", "Popen") + b")\x81" + mapping({"args": arg}) + b"b",
    ),
}  # fmt: skip
WORKING = [n for n in CALLS if n.startswith(("GLOBAL", "INST", "OBJ", "STACK", "EXT"))]
for way, (named, code) in CALLS.items():
    for form in ("archive", "legacy"):

        def build(folder: Path, code: Callable[[bytes], bytes] = code, form: str = form) -> bytes:
            content = program(mapping({"a": tensor(), "b": code(mark(folder))}), 4)
            return archive(members(content)) if form == "archive" else legacy(content)

        case(f"call by {way}, {form}", f"would call .*{named}", build)

for place in ("protocol", "system", "keys"):
    case(
        f"code: the legacy pickle '{place}'",
        rf"would call {MKDIR}",
        lambda folder, p=place: legacy(
            program(OLD_GOOD), **{p: program(call(name(SYSTEM, FUNCTION), mark(folder)))}
        ),
    )
case("whole module", r"would call .*Linear", saved(nn.Linear(2, 2)))
case(
    "whole module, legacy",
    r"would call .*Linear",
    saved({"model": nn.Linear(2, 2)}, _use_new_zipfile_serialization=False),
)
case(
    "NumPy number in an optimizer",
    r"would call .*numpy.*scalar.*scripts/convert_checkpoint\.py",
    saved({"model": STATE, "optimizer": {"lr": np.float64(0.1)}}),
)
case("sparse tensor", "would call .*_rebuild_sparse", saved({"a": torch.eye(4).to_sparse()}))
case("meta tensor", "would call .*meta", saved({"a": torch.ones(4, device="meta")}))


def quantized(folder: Path) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return saved({"a": torch.quantize_per_tensor(torch.ones(4), 1.0, 0, torch.qint8)})(folder)


case("quantized tensor", "would call .*_rebuild_qtensor", quantized)


def scripted(folder: Path) -> bytes:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), folder / "scratch")
    return (folder / "scratch").read_bytes()


case("TorchScript", "a TorchScript archive", scripted)

# Pickles of allowed names that do what no checkpoint does. PyTorch's own list allows the first two.

case(
    "call that allocates",
    "would call builtins.bytearray",
    saved({"state_dict": STATE, "x": Call(bytearray, 1 << 45)}),
)
case(
    "call that makes a tensor",
    "would call torch.Tensor",
    saved({"state_dict": STATE, "x": Call(torch.Tensor, 1 << 45)}),
)
UNTYPED = name("torch.storage", "UntypedStorage")
ORDERED = call(name("collections", "OrderedDict"))
NESTED = b")q\x00" + b"h\x00\x86q\x00" * 60
"""A tuple of 2^60 others; whatever walks through it never comes back."""
HUGE = items([number(0)] * 20_000) + b"q\x01"
BODIES: dict[str, tuple[str, bytes]] = {
    "storage made by a call": ("calls torch.storage", call(UNTYPED, number(1 << 45))),
    "a number type called": ("calls torch.float32", call(name("torch", "float32"), number(1))),
    "nested tuple called": ("calls something", NESTED + b")R"),
    "nested tuple as a key": ("as a key", b"}" + NESTED + b"Ns"),
    "nested tuple in a set": ("as a key", call(name("builtins", "set"), b"]" + NESTED + b"a")),
    "nested tuple as storage": ("no storage", NESTED + b"Q"),
    "sets without end": (
        "steps to read", HUGE + b"".join([call(name("builtins", "set"), b"h\x01")] * 1000)
    ),
    "counts of a text": ("arguments", call(name("collections", "Counter"), text("aaaa"))),
    "namespaces without end": (
        "steps to read",
        mapping({f"k{i}": b"N" for i in range(20_000)}) + b"q\x01"
        + b"".join([name("argparse", "Namespace") + b")\x81h\x01b"] * 1000),
    ),
    "steps without end": ("steps to read", b"]" + b"]a" * 1_100_000),
    "a dict with a method of its own": (
        "sets attributes", ORDERED + mapping({"items": text("x")}) + b"b"
    ),
    "attributes of a tensor": ("sets attributes", tensor() + mapping({"x": b"N"}) + b"b"),
    "legacy state of a tensor": (
        "sets attributes", tensor() + items([storage(), number(0), b")", b")"]) + b"b"
    ),
    "hooks": ("arguments", tensor(
        hooks=ORDERED + text("x") + name("collections", "Counter") + b"s")),
    "metadata of a tensor": ("arguments", tensor(extra=[mapping({"neg": b"\x88"})])),
    "persistent id of a module": (
        "no storage", items([text("module"), b"N", text("x.py"), text("import os")]) + b"Q"
    ),
    "persistent id of text": ("no storage", text("storage") + b"Q"),
    "storage of an unknown name": ("another size", storage("../../etc/passwd")),
    "storage too large": ("another size", tensor((1 << 40,), block=storage(count=1 << 40))),
    "storage too small": ("another size", tensor((2,), block=storage(count=2))),
    "storage of negative size": ("unknown way", storage(count=-1)),
    "storage of another kind": ("another size", storage(kind="DoubleStorage")),
    "tensor beyond its storage": ("beyond the end", tensor((1 << 40,))),
    "tensor with offset": ("beyond the end", tensor((4,), offset=1)),
    "tensor with stride": ("beyond the end", tensor((4,), (2,))),
    "tensor of negative size": ("arguments", tensor((-4,))),
    "tensor with negative stride": ("arguments", tensor((4,), (-1,))),
    "tensor of many dimensions": ("arguments", tensor([1] * 60)),
    "tensor of two ranks": ("arguments", tensor((4,), (1, 1))),
    "tensor over no storage": ("arguments", tensor(block=number(4))),
    "tensor of a larger type": ("beyond the end", tensor(
        extra=[name("torch", "float64")], function="_rebuild_tensor_v3")),
    "unknown memo": ("breaks its own rules", b"h\x77"),
    "odd pairs": ("no dict", b"}(N" + b"u"),
    "items of a list": ("no dict", b"]NNs"),
    "append to a dict": ("no list", b"}Na"),
    "frozen set": ("uses", b"(\x91"),
}  # fmt: skip
for label, (message, body) in BODIES.items():
    case(f"pickle: {label}", message, pickled(mapping({"a": tensor(), "b": body})))
case("pickle: underflow", "breaks its own rules", pickled(b"R"))
case("pickle: without an object", "ends without an object", pickled(b""))
case("pickle: text of gigabytes", "cut short", pickled(b"X" + struct.pack("<I", 0xFFFFFFF0) + b"x"))
case(
    "pickle: deep lists",
    "no tensors",
    pickled(mapping({"b": b"(]q\x02" + b"](h\x02eq\x02" * 10_000 + b"t"})),
)
case(
    "pickle: tensors that share one number",
    "more values than the file",
    pickled(mapping({"a": tensor((1 << 40,), (0,))})),
)
case(
    "pickle: many tensors that share all numbers",
    "more values than the file",
    lambda folder: archive(
        members(
            program(
                mapping(
                    {f"a{i}": tensor((1 << 18,), block=storage(count=1 << 18)) for i in range(20)}
                )
            ),
            {"0": bytes(1 << 20)},
        )
    ),
)
case(
    "pickle: no numbers of a huge shape",
    "more values",
    pickled(mapping({"a": tensor((0, 1 << 40), (1, 1))})),
)
case(
    "legacy: storage of terabytes",
    "larger than the file",
    legacy(program(mapping({"a": tensor((1 << 38,), block=storage(count=1 << 38, view=b"N"))}))),
)
case(
    "legacy: tensor beyond its storage",
    "beyond the end",
    legacy(program(mapping({"a": tensor((1 << 38,), block=OLD_STORAGE)}))),
)
case("legacy: bytes at the end", "are there", legacy(program(OLD_GOOD)) + b"x")
case(
    "legacy: keys twice",
    "other storages",
    legacy(program(OLD_GOOD), keys=pickle.dumps(["0", "0"], 2)),
)
case(
    "legacy: keys of others",
    "other storages",
    legacy(program(OLD_GOOD), keys=pickle.dumps(["1"], 2)),
)
case("legacy: wrong count", "safe reader", legacy(program(OLD_GOOD), item_bytes=2))
case(
    "legacy: also a tar",
    "cut short|plain pickle|tar",
    legacy(program(OLD_GOOD))[:257] + b"ustar" + bytes(800),
)

# Wrappers and keys.


def maze(width: int, depth: int) -> bytes:
    """Dicts that hold the next one many times over, without a tensor anywhere."""
    levels = b"Nq\x00"
    for _ in range(depth):
        levels += mapping({str(i): b"h\x00" for i in range(width)}) + b"q\x00"
    return mapping({"levels": b"(" + levels + b"t", "model": b"h\x00"})


case("maze of dicts", "holds no tensors", pickled(maze(400, 8)))
case(
    "wrappers too deep",
    "holds no tensors",
    pickled(
        mapping(
            {
                "model": mapping(
                    {
                        "model": mapping(
                            {
                                "model": mapping(
                                    {"model": mapping({"model": mapping({"model": GOOD})})}
                                )
                            }
                        )
                    }
                )
            }
        )
    ),
)
case("key of 5000 characters", "no name of a parameter", pickled(mapping({"a" * 5000: tensor()})))
case("key that is a number", "no name of a parameter", pickled(b"}" + number(3) + tensor() + b"s"))
case("key that paints the terminal", r"'\\x1b\[31mb'", pickled(mapping({"\x1b[31mb": tensor()})))
case("keys that paint, no tensors", r"'\\x1b\[31mb'", pickled(mapping({"\x1b[31mb": b"N"})))
case("list of tensors", "holds a list", saved([torch.ones(4)]))
case("tensor alone", "holds a Tensor", saved(torch.ones(4)))

# Archives.

BODY = program(GOOD)
GOOD_MEMBERS = members(BODY)


def changed(index: int, **facts: object) -> bytes:
    """The archive with one member described in another way, twice alike unless told."""
    parts = members(BODY)
    parts[index] = Member(parts[index].name, parts[index].data, **facts)  # type: ignore[arg-type]
    return archive(parts)


def with_member(path: str | bytes, **facts: object) -> bytes:
    return archive([*GOOD_MEMBERS, Member(path, b"x", **facts)])  # type: ignore[arg-type]


def deflated(mebibytes: int) -> bytes:
    """An archive whose pickle is zeros, squeezed; the same stretch again and again."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    stretch = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    data = stretch * mebibytes + b"\x03\x00"
    facts = {"size": mebibytes << 20, "method": 8}
    return archive([Member("z/data.pkl", data, local=facts, central=facts)])


ODD_PATHS = [
    "z/../../etc/passwd",
    "/z/x",
    "z\\x",
    "z//x",
    "z/./x",
    "z/x\n",
    "z/\x1b[31m",
    "z/",
    "C:\\x",
]
for path in ODD_PATHS:
    case(f"zip: path {path!r}", "odd path", with_member(path))
case("zip: path of no text", "odd path", with_member(b"z/\xff"))
case("zip: member twice", "twice", with_member("z/data.pkl"))
case("zip: member in capitals", "twice", with_member("z/DATA.pkl"))
case("zip: two folders", "no checkpoint of torch.save", with_member("y/x"))
case("zip: no pickle", "no checkpoint of torch.save", archive(GOOD_MEMBERS[1:]))
case("zip: link", "symbolic link", with_member("z/x", central={"mode": 0o120777}))
case("zip: TorchScript", "a TorchScript archive", with_member("z/constants.pkl"))
case("zip: compressed", "compressed", lambda folder: deflated(1))
case("zip: bomb", "compressed", lambda folder: deflated(2048))
case("zip: encrypted", "encrypted", changed(2, central={"flags": 1}))
case("zip: compressed behind the directory's back", "two ways", changed(2, local={"method": 8}))
case("zip: other name inside", "two ways", changed(2, local={"name": b"z/data/1"}))
case("zip: other size inside", "two ways", changed(2, local={"size": 8}))
case("zip: other packed size", "two ways", changed(2, central={"packed": 8}))
case(
    "zip: member larger than the file",
    "declare",
    changed(
        2, local={"size": 1 << 30, "packed": 1 << 30}, central={"size": 1 << 30, "packed": 1 << 30}
    ),
)
case(
    "zip: member over the next",
    "overlaps",
    changed(2, local={"size": 60, "packed": 60}, central={"size": 60, "packed": 60}),
)
case("zip: checksum", "CRC", changed(2, local={"crc": 7}, central={"crc": 7}))
case("zip: gap", "belong to no member", changed(2, gap=bytes(100)))
case("zip: member outside", "readable archive", changed(2, central={"start": 1 << 31}))
case(
    "zip: prepended, not counted",
    "displaced",
    archive(GOOD_MEMBERS, prefix=b"PK\x03\x04" + bytes(60)),
)
case(
    "zip: prepended, counted",
    "belong to no member",
    archive([Member("z/data.pkl", BODY, gap=b"PK\x03\x04" + bytes(60)), *GOOD_MEMBERS[1:]]),
)
case("zip: two archives", "displaced", pickled(GOOD) + pickled(GOOD))
case("zip: bytes at the end", "directory at its end is missing", archive(GOOD_MEMBERS, suffix=b"x"))
case("zip: directory elsewhere", "displaced", archive(GOOD_MEMBERS, shift=-8))
case("zip: more members claimed", "breaks off", archive(GOOD_MEMBERS, count=5))
case("zip: fewer members claimed", "another length", archive(GOOD_MEMBERS, count=3))
case("zip: zip64 elsewhere", "zip64 directory is displaced", archive(GOOD_MEMBERS, zip64=(-8, 4)))
case("zip: zip64 of billions", "declares", archive(GOOD_MEMBERS, zip64=(0, 1 << 40)))
ZIP64 = struct.pack("<2HQ", 1, 8, 1 << 40)
case(
    "zip: zip64 size",
    "two ways|declare",
    changed(2, central={"size": 0xFFFFFFFF, "packed": 16, "extra": ZIP64}),
)
case(
    "zip: zip64 twice",
    "zip64 field is wrong",
    changed(2, central={"size": 0xFFFFFFFF, "packed": 16, "extra": ZIP64 * 2}),
)
case("zip: zip64 missing", "zip64 field is wrong", changed(2, central={"size": 0xFFFFFFFF}))
case(
    "zip: pickle of many MiB",
    "its pickle is larger",
    lambda folder: archive(members(bytes(33 << 20))),
)

# Safetensors headers that lie.


def header(**facts: object) -> bytes:
    return safetensors_bytes({"a": {**ENTRY, **facts}})


FORGED = "damaged or forged"
for label, content in {
    "length beyond the file": safetensors_bytes({"a": ENTRY}, length=1 << 20),
    "length of terabytes": safetensors_bytes({"a": ENTRY}, length=1 << 42),
    "length of many MiB": safetensors_bytes(json.dumps({"a": ENTRY}).encode() + b" " * (9 << 20)),
    "length negative": safetensors_bytes({"a": ENTRY}, length=(1 << 64) - 1),
    "no JSON": safetensors_bytes(b"{'a': 1}"),
    "no UTF-8": safetensors_bytes(b'{"\xff": 1}'),
    "deep nesting": safetensors_bytes(b'{"a":' + b"[" * 200_000 + b"}"),
    "deep objects": safetensors_bytes(b'{"a":' * 200_000 + b"1" + b"}" * 200_000),
    "number of a million digits": safetensors_bytes(b'{"a":' + b"9" * 1_000_000 + b"}"),
    "many lists": safetensors_bytes(b'{"a":[' + b"[]," * 300_000 + b"[]]}"),
    "NaN": safetensors_bytes(
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}'),
    "Infinity": safetensors_bytes(
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,Infinity]}}'),
    "-Infinity": safetensors_bytes(
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[-Infinity,16]}}'),
    "1e400": safetensors_bytes(b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,16]}}'),
    "key twice": safetensors_bytes(b'{"a":%s,"a":%s}' % ((json.dumps(ENTRY).encode(),) * 2)),
    "field twice": safetensors_bytes(
        b'{"a":{"dtype":"F32","dtype":"F64","shape":[4],"data_offsets":[0,16]}}'),
    "no object": safetensors_bytes(b'{"a":1}'[:-3] + b"1}"),
    "entry no object": safetensors_bytes({"a": [1]}),
    "field missing": safetensors_bytes({"a": {"dtype": "F32", "shape": [4]}}),
    "field too many": header(x=1),
    "dtype unknown": header(dtype="F33"),
    "dtype wrong": header(dtype="F64"),
    "dtype no string": header(dtype=["F32"]),
    "shape wrong": header(shape=[5]),
    "shape negative": header(shape=[-2, -2]),
    "shape fractional": header(shape=[4.0]),
    "shape boolean": header(shape=[True, 4]),
    "shape overflowing": header(shape=[1 << 40, 1 << 40], data_offsets=[0, 1 << 82]),
    "shape wrapping around": header(shape=[1 << 32, 1 << 32, 4]),
    "shape of many dimensions": header(shape=[1] * 50 + [4]),
    "offsets reversed": header(data_offsets=[16, 0]),
    "offsets negative": header(data_offsets=[-16, 0]),
    "offsets three": header(data_offsets=[0, 16, 32]),
    "out of range": header(data_offsets=[1 << 30, (1 << 30) + 16]),
    "terabytes": header(shape=[1 << 40], data_offsets=[0, 1 << 42]),
    "overlap": safetensors_bytes(
        {"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 24]}}, bytes(24)),
    "same bytes": safetensors_bytes({"a": ENTRY, "b": ENTRY}),
    "gap": safetensors_bytes({"a": {**ENTRY, "data_offsets": [4, 20]}}, bytes(20)),
    "bytes at the end": safetensors_bytes({"a": ENTRY}, bytes(20)),
    "cut short": safetensors_bytes({"a": ENTRY}, bytes(15)),
    "metadata no strings": safetensors_bytes({"__metadata__": {"x": 1}, "a": ENTRY}),
    "metadata no object": safetensors_bytes({"__metadata__": [1], "a": ENTRY}),
}.items():  # fmt: skip
    case(f"safetensors: {label}", FORGED, content)
case("safetensors: no tensors", "holds no tensors", safetensors_bytes({}, b""))
case(
    "safetensors: no numbers of a huge shape",
    "more values",
    safetensors_bytes({"a": ENTRY, "b": {**ENTRY, "shape": [0, 1 << 40], "data_offsets": [0, 0]}}),
)
NOTHING = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
case(
    "safetensors: 26,000 tensors",
    "declares 26001 tensors",
    lambda folder: safetensors_bytes({"a": ENTRY, **{f"{i}": NOTHING for i in range(26_000)}}),
)
for label, content in {
    "no JSON": "{", "a list": "[1]", "deep": "[" * 100_000, "arguments": '{"arguments": [1]}',
    "name": '{"name": 3}', "deploy": '{"deploy": "no"}',
}.items():  # fmt: skip
    case(
        f"safetensors: description, {label}",
        "the metadata 'backbones'",
        safetensors_bytes({"__metadata__": {"backbones": content}, "a": ENTRY}),
    )
CHAINS = ["module.", "_orig_mod.", "model.", "backbone.", "encoder."]
EVERY_CHAIN = [x + y + z for x in CHAINS for y in CHAINS for z in CHAINS]
case(
    "safetensors: every prefix",
    "does not fit",
    lambda folder: safetensors_bytes(
        {"b": ENTRY, **{f"{EVERY_CHAIN[i % 125]}{i}": NOTHING for i in range(5_000)}}
    ),
)

# Numbers that no model can hold.

for kind in ("safetensors", "torch"):
    for label, (message, values) in {
        "NaN": ("not finite", torch.tensor([0, 1, float("nan"), 2])),
        "infinity": ("not finite", torch.tensor([0, 1, float("-inf"), float("inf")])),
        "NaN of half precision": ("not finite", torch.tensor([0, 1, float("nan"), 2]).half()),
        "NaN of eight bits": (
            "not finite",
            torch.tensor([0, 1, float("nan"), 2]).to(torch.float8_e4m3fn),
        ),
        "more than a float holds": (
            "too large for torch.float32",
            torch.full((4,), 1e300, dtype=torch.float64),
        ),
        "integers": ("holds torch.int64", torch.arange(4)),
        "booleans": ("holds torch.bool", torch.ones(4, dtype=torch.bool)),
        "complex numbers": ("holds torch.complex64", torch.ones(4, dtype=torch.complex64)),
        "another shape": (r"\(5,\), the model has \(4,\)", torch.ones(5)),
        "two by two": (r"\(2, 2\), the model has \(4,\)", torch.ones(2, 2)),
    }.items():
        content = {"a": values}
        build = (
            saved(content)
            if kind == "torch"
            else (lambda folder, content=content: safetensors.torch.save(content))
        )
        case(f"values: {label}, {kind}", message, build)


# The tests.

ENDLESS = "pickle: steps without end"
"""Takes as long as any file can."""


def refused(path: Path, message: str, modes: Sequence[bool] = (True, False)) -> None:
    """Check that a file is refused, strictly or not, for that reason, and changes no model."""
    model = Single()
    before = snapshot(model)
    for strict in modes:
        start = time.perf_counter()
        with pytest.raises(CheckpointError, match=message) as caught:
            backbones.load_checkpoint(model, path, strict=strict)
        assert time.perf_counter() - start < SECONDS
        text = str(caught.value)
        assert text.startswith(str(path))
        assert len(text) < 2000 and text.isprintable()
        assert not isinstance(caught.value, TypeError)
        assert_same(model, before)


@pytest.mark.timeout(4 * SECONDS)
@pytest.mark.parametrize(
    "label",
    [
        pytest.param(label, marks=pytest.mark.slow) if label == ENDLESS else label
        for label in HOSTILE
    ],
)
def test_refused(label: str, tmp_path: Path) -> None:
    message, build = HOSTILE[label]
    path = written(tmp_path / "mine.pth", build(tmp_path))
    (tmp_path / "scratch").unlink(missing_ok=True)
    refused(path, message, [True] if "without end" in label else (True, False))
    assert list(tmp_path.iterdir()) == [path]  # nothing ran, nothing was written


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy", "by hand", "legacy by hand"])
def test_harmless_files_load(form: str, tmp_path: Path) -> None:
    """What the hostile files are made of: without the one thing, each loads."""
    content = {
        "safetensors": lambda: safetensors.torch.save(STATE),
        "zip": lambda: saved({"state_dict": STATE, "epoch": 3})(tmp_path),
        "legacy": lambda: saved(STATE, _use_new_zipfile_serialization=False)(tmp_path),
        "by hand": lambda: archive(members(BODY, {"0": STATE["a"].numpy().tobytes()})),
        "legacy by hand": lambda: legacy(program(OLD_GOOD), {"0": STATE["a"].numpy().tobytes()}),
    }[form]()
    model = Single()
    assert backbones.load_checkpoint(model, written(tmp_path / "mine.pth", content)).loaded == 1
    assert torch.equal(model.a, STATE["a"])


@pytest.mark.parametrize("way", WORKING)
def test_the_calls_work_where_nothing_guards(way: str, tmp_path: Path) -> None:
    """The code in the files above is live, and PyTorch's reader alone would refuse it too."""
    content = program(mapping({"a": b"N", "b": CALLS[way][1](mark(tmp_path))}), 4)
    path = written(tmp_path / "mine.pth", archive(members(content)))
    with pytest.raises(pickle.UnpicklingError), pytest.warns(UserWarning, match="protocol 4"):
        torch.load(path, weights_only=True)
    assert not (tmp_path / "mark").exists()
    copyreg.add_extension(SYSTEM, FUNCTION, 240)
    try:
        pickle.loads(content)
    finally:
        copyreg.remove_extension(SYSTEM, FUNCTION, 240)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", [p for p in positions(None) if p != "setstate"])
def test_the_positions_work_where_nothing_guards(place: str, form: str, tmp_path: Path) -> None:
    content = HOSTILE[f"code: {place}, {form}"][1](tmp_path)
    path = written(tmp_path / "mine.pth", content)
    with pytest.raises(Exception, match="(?i)weights_only|unsupported|allowed"):
        torch.load(path, weights_only=True)
    assert not (tmp_path / "mark").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "mark").exists()


def test_sparse_file_of_terabytes(tmp_path: Path) -> None:
    """The disk holds a few bytes of it, the header tells the truth about its size."""
    size = 1 << 42
    content = safetensors_bytes(
        {"a": {**ENTRY, "shape": [size // 4], "data_offsets": [0, size]}}, b""
    )
    path = written(tmp_path / "mine.safetensors", content)
    os.truncate(path, len(content) + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, "damaged|the model has")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < ROOM >> 10


def test_folders_devices_and_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        refused(path, "a folder|no regular file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop", "cannot be read")


@pytest.mark.parametrize(
    "label",
    [
        "web page",
        "call by GLOBAL, archive",
        "zip: bomb",
        "safetensors: terabytes",
        "values: NaN, safetensors",
        "safetensors: description, arguments",
        "every prefix",
    ],
)
def test_refused_by_create_model(label: str, tmp_path: Path) -> None:
    label = label if label in HOSTILE else f"safetensors: {label}"
    path = written(tmp_path / "mine.safetensors", HOSTILE[label][1](tmp_path))
    message = "does not fit" if label.startswith("values") else HOSTILE[label][0]
    with pytest.raises(CheckpointError, match=message) as caught:
        backbones.create_model("convnext_atto", checkpoint_path=path)
    assert str(path) in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_nan_in_a_whole_model(tmp_path: Path) -> None:
    model = backbones.create_model("convnext_atto")
    before = snapshot(model)
    state = {key: value + 1 for key, value in before.items()}
    last = list(state)[-1]
    state[last].view(-1)[-1] = float("nan")
    torch.save({"model": state}, tmp_path / "mine.pth")
    with pytest.raises(CheckpointError, match=f"{last}.*not finite"):
        backbones.load_checkpoint(model, tmp_path / "mine.pth")
    assert_same(model, before)
    with pytest.raises(CheckpointError, match=f"{last}.*not finite"):
        backbones.create_model("convnext_atto", checkpoint_path=tmp_path / "mine.pth")


def test_the_way_out_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.pth", HOSTILE["code: value, zip"][1](tmp_path))
    with pytest.raises(UnsafeCheckpointError) as caught:
        backbones.load_checkpoint(Single(), path)
    assert "scripts/convert_checkpoint.py --i-trust-this-file" in str(caught.value)
    script = Path(__file__).parents[2] / "scripts" / "convert_checkpoint.py"
    assert script.is_file() and "--i-trust-this-file" in script.read_text()


# YAML files of users.

MINE = "family: convnext\nvariants:\n  mine:\n    depths: [1, 1, 1, 1]\n    dims: [8, 8, 8, 8]\n"
BOMB = "x0: &x0 [a]\n" + "".join(
    f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
NESTED = "nested too deeply|maximum nesting depth"  # ours, or libyaml's
YAML: dict[str, tuple[str, str | bytes]] = {
    "aliases that multiply": ("aliases", BOMB + MINE),
    "alias of itself": ("aliases", MINE + "x: &x [*x]\n"),
    "merge of itself": ("aliases", MINE + "x: &x {<<: *x}\n"),
    "merge key": ("merge keys", MINE + "    <<: {depths: [1]}\n"),
    "deep brackets": (NESTED, "[" * 500_000),
    "deep braces": (NESTED, "{a: " * 200_000),
    "deep dashes": (NESTED, "- " * 400_000 + "x"),
    "deep question marks": (NESTED, "? " * 400_000 + "x"),
    "deep lines": (NESTED, "".join(f"{' ' * i}a:\n" for i in range(500))),
    "a million values": ("unknown key", "x: [" + "1," * 400_000 + "1]\n"),
    "a million lines": ("at the top level", "- \n" * 300_000),
    "a million keys": ("unknown key", "".join(f"k{i}: 1\n" for i in range(90_000))),
    "large file": ("larger than 1 MiB", "#" * (2 << 20)),
    "Python tag": ("tags", MINE + "x: !!python/object/apply:os.mkdir [mark]\n"),
    "Python name": ("tags", MINE + "x: !!python/name:os.system\n"),
    "tag on a mapping": ("tags", MINE.replace("mine:", "mine: !!python/object:os.mkdir")),
    "tag of one's own": ("tags", MINE + "x: !mine 3\n"),
    "binary": ("tags", MINE + "x: !!binary aGVsbG8=\n"),
    "number of base 60": ("too long", MINE.replace("8]", "1" + ":59" * 100_000 + "]")),
    "number of many digits": ("too long", MINE.replace("8]", "9" * 100_000 + "]")),
    "number in hexadecimal": ("too long", MINE.replace("8]", "0x" + "f" * 100_000 + "]")),
    "number of 200 bits": ("too large", MINE.replace("8]", "0x" + "f" * 50 + "]")),
    "key of a number of many digits": ("too long", MINE + f"    {'9' * 900}: 1\n"),
    "a mapping as key": ("is not text", MINE + "    ? {a: 1}\n    : 1\n"),
    "ten thousand defaults": ("unknown key", MINE + "defaults:\n" + "".join(
        f"  k{i}: 1\n" for i in range(10_000))),
    "ten thousand arguments": ("unknown key", MINE + "".join(
        f"    k{i}: 1\n" for i in range(10_000))),
    "two documents": ("not valid YAML", MINE + "---\n" + MINE),
    "control characters": ("not valid YAML", MINE + "x: \x00\n"),
    "no text": ("UTF-8", b"\xff\xfe\x00"),
}  # fmt: skip


LONG = {
    "ten thousand heirs": "".join(f"  m{i}: {{like: mine}}\n" for i in range(10_000)),
    "heirs in a row": "".join(f"  m{i}: {{like: m{i + 1}}}\n" for i in range(100))
    + "  m100: {like: mine}\n",
    "heirs that gather arguments": "  m0: {like: mine}\n"
    + "".join(
        f"  m{i}:\n    like: m{i - 1}\n" + "".join(f"    k{i}_{j}: 1\n" for j in range(100))
        for i in range(1, 20)
    ),
}


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("label", LONG)
def test_long_yaml_is_read_in_time(label: str, tmp_path: Path) -> None:
    path = written(tmp_path / "mine.yaml", (MINE + LONG[label]).encode())
    start = time.perf_counter()
    assert backbones.model_info(f"{path}#mine").arguments["depths"] == [1, 1, 1, 1]
    assert time.perf_counter() - start < SECONDS


def as_bytes(content: str | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.encode()


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("label", YAML)
def test_yaml_is_refused(label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message, content = YAML[label]
    path = written(tmp_path / "mine.yaml", as_bytes(content))
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=message) as caught:
        backbones.create_model("./mine.yaml#mine", device="meta")
    assert time.perf_counter() - start < SECONDS
    assert "mine.yaml" in str(caught.value) and len(str(caught.value)) < 2000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.timeout(SECONDS)
def test_yaml_without_an_end(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="no regular file"):
        backbones.create_model(str(tmp_path / "mine.yaml"))


def test_harmless_yaml_loads(tmp_path: Path) -> None:
    """What the hostile ones are made of; quotes and brackets in text are no nesting."""
    text = MINE + f"sources:\n  x: {{title: '{'[' * 100}', paper: \"p\", repository: r}}\n"
    written(tmp_path / "mine.yaml", text.encode())
    model = backbones.create_model(str(tmp_path / "mine.yaml"), device="meta")
    assert model.config["name"] == "mine"


CHILD = """
import json, resource, sys, time
sys.path[:0] = json.loads(sys.argv[1])
import pytest, backbones, test_hostile_files as suite
from pathlib import Path
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + suite.ROOM, used + suite.ROOM))
for label, path in json.loads(sys.stdin.read()).items():
    print(label, flush=True)
    if label in suite.HOSTILE:
        suite.refused(Path(path), suite.HOSTILE[label][0], modes=[True])
    else:
        with pytest.raises(suite.ConfigError, match=suite.YAML[label][0]):
            backbones.model_info(f"{path}#mine")
"""


def test_all_in_little_memory(tmp_path: Path) -> None:
    """The same in a process that cannot grow: an explosion ends it, or changes the message."""
    paths = {}
    hostile = {label: made for label, made in HOSTILE.items() if label != ENDLESS}
    for number_of, (label, (_, build)) in enumerate(hostile.items()):
        folder = tmp_path / str(number_of)
        folder.mkdir()
        paths[label] = str(written(folder / "mine.pth", build(folder)))
    for label, (_, content) in YAML.items():
        paths[label] = str(written(tmp_path / f"{len(paths)}.yaml", as_bytes(content)))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(sys.path)],
        input=json.dumps(paths),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout.splitlines()[-1:], done.stderr[-3000:])
    assert done.stdout.splitlines() == [*hostile, *YAML]
