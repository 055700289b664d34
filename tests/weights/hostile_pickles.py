"""Pickles, archives and headers put together by hand, byte by byte."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)


def number(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def items(values: Sequence[bytes]) -> bytes:
    """A tuple."""
    return b"(" + b"".join(values) + b"t"


def mapping(entries: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + items(arguments) + b"R"


def program(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


def storage(key: str = "0", count: int = 4, kind: str = "FloatStorage", view: bytes = b"") -> bytes:
    module = "torch.storage" if kind == "UntypedStorage" else "torch"
    parts = [text("storage"), name(module, kind), text(key), text("cpu"), number(count)]
    return items([*parts, *([view] if view else [])]) + b"Q"


def tensor(
    shape: Sequence[int] = (4,),
    stride: Sequence[int] | None = None,
    *,
    offset: int = 0,
    block: bytes | None = None,
    hooks: bytes | None = None,
    extra: Sequence[bytes] = (),
    function: str = "_rebuild_tensor_v2",
) -> bytes:
    """A tensor over storage "0" of four numbers, unless told otherwise."""
    steps = [1] * len(shape) if stride is None else stride
    return call(
        name("torch._utils", function),
        block or storage(),
        number(offset),
        items([number(n) for n in shape]),
        items([number(n) for n in steps]),
        b"\x89",
        hooks or call(name("collections", "OrderedDict")),
        *extra,
    )


@dataclass
class Member:
    """A member of an archive, and what its two headers say of it where that is a lie."""

    name: str | bytes
    data: bytes = b""
    local: dict[str, Any] = field(default_factory=dict)
    central: dict[str, Any] = field(default_factory=dict)
    gap: bytes = b""
    """Bytes in front of it."""

    def header(self, lies: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
        raw = self.name.encode() if isinstance(self.name, str) else self.name
        size = len(self.data)
        facts = {"name": raw, "size": size, "packed": size, "method": 0, "flags": 0, "crc": 0}
        facts |= {"extra": b"", "mode": 0, **lies}
        return facts["name"], facts


def archive(
    members: Sequence[Member],
    *,
    prefix: bytes = b"",
    suffix: bytes = b"",
    shift: int = 0,
    count: int | None = None,
    zip64: tuple[int, int] | None = None,
) -> bytes:
    """A zip file.

    Args:
        members: what is in it.
        prefix: bytes in front of everything, which no position counts.
        suffix: bytes behind everything.
        shift: added to the directory's position.
        count: the number of members it claims.
        zip64: write the directory's end for large files too, moved by the first number of bytes
            and claiming the second number of members.
    """
    out, entries = bytearray(), bytearray()
    for member in members:
        out += member.gap
        raw, facts = member.header(member.local)
        start = len(out)
        out += b"PK\x03\x04" + struct.pack("<3H4x", 20, facts["flags"], facts["method"])
        out += struct.pack("<3I", facts["crc"], facts["packed"], facts["size"])
        out += (
            struct.pack("<2H", len(raw), len(facts["extra"])) + raw + facts["extra"] + member.data
        )
        raw, facts = member.header(member.central)
        entries += b"PK\x01\x02" + struct.pack("<4H4x", 20, 20, facts["flags"], facts["method"])
        entries += struct.pack("<3I", facts["crc"], facts["packed"], facts["size"])
        entries += struct.pack("<5H", len(raw), len(facts["extra"]), 0, 0, 0)
        entries += struct.pack("<2I", facts["mode"] << 16, facts.get("start", start))
        entries += raw + facts["extra"]
    begin, number_of = len(out), len(members) if count is None else count
    out += entries
    if zip64:
        end = len(out)
        out += b"PK\x06\x06" + struct.pack("<Q2H2I", 44, 45, 45, 0, 0)
        out += struct.pack("<4Q", zip64[1], zip64[1], len(entries), begin)
        out += b"PK\x06\x07" + struct.pack("<IQI", 0, end + zip64[0], 1)
    out += b"PK\x05\x06" + struct.pack("<4H", 0, 0, number_of, number_of)
    out += struct.pack("<2IH", len(entries), begin + shift, 0)
    return prefix + bytes(out) + suffix


def members(pickled: bytes, storages: Mapping[str, bytes] | None = None) -> list[Member]:
    """The members of a checkpoint, as torch.save arranges them."""
    blocks = {"0": bytes(16)} if storages is None else storages
    return [
        Member("z/data.pkl", pickled),
        Member("z/byteorder", b"little"),
        *(Member(f"z/data/{key}", data) for key, data in blocks.items()),
        Member("z/version", b"3\n"),
    ]


def legacy(
    content: bytes,
    storages: Mapping[str, bytes] | None = None,
    *,
    protocol: bytes | None = None,
    system: bytes | None = None,
    keys: bytes | None = None,
    item_bytes: int = 4,
) -> bytes:
    """A file in the format before PyTorch 1.6: five pickles and the storages."""
    blocks = {"0": bytes(16)} if storages is None else storages
    facts = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    out = MAGIC + (protocol or pickle.dumps(1001, 2)) + (system or pickle.dumps(facts, 2))
    out += content + (keys or pickle.dumps(list(blocks), 2))
    for data in blocks.values():
        out += struct.pack("<q", len(data) // item_bytes) + data
    return out


def safetensors_bytes(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
