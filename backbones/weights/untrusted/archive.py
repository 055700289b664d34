"""The zip archive around a file of `torch.save`, held to the one shape such archives have.

Readers of zip files disagree on what odd archives mean: where the directory starts when bytes are
put in front, which of two sizes or two equal names counts. A file that one reader finds harmless
may then hold something else for the next. So whatever two readers could take differently is
refused here: one directory at the very end, members one after the other from the first byte on,
and every fact that is stored twice stored alike.
"""

import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from backbones.errors import CheckpointError

__all__ = ["read_archive"]

# A member a tensor and a handful more; the largest training checkpoints have 20,000 tensors.
_MAX_MEMBERS = 100_000
_MAX_ENTRY_BYTES = 1024
_DESCRIPTOR_BYTES = 24  # sizes and checksum once more behind a member's bytes
_HUGE = 0xFFFFFFFF  # "look into the zip64 field"
_DO_NOT_USE = "no file of torch.save looks so, do not use it"
_DAMAGED = "damaged or cut short, no readable archive"


@dataclass(frozen=True)
class _Member:
    name: str
    start: int
    """Position of its header."""
    begin: int
    """Position of its bytes."""
    size: int
    checksum: int

    @property
    def end(self) -> int:
        return self.begin + self.size


def read_archive(
    stream: BinaryIO, size: int, max_pickle_bytes: int
) -> tuple[bytes, dict[str, int]]:
    """Check the archive open as `stream`, `size` bytes long; return what `torch.load` will find.

    That is the pickle, and the bytes of every storage by the name the pickle uses for it.
    Checksums are verified, which PyTorch does not do. Memory is bounded by `max_pickle_bytes` and
    by the number of members allowed.

    Raises:
        CheckpointError: the archive is damaged, odd, or none of `torch.save`. The message lacks
            the file's name.
    """
    members = _members(stream, size)
    names = {member.name for member in members}
    pickles = [m for m in members if m.name.count("/") == 1 and m.name.endswith("/data.pkl")]
    roots = {name.split("/")[0] for name in names}
    if len(pickles) != 1 or len(roots) != 1:
        raise CheckpointError(
            "a zip archive, but no checkpoint of torch.save; give a .safetensors file or one "
            "written by torch.save"
        )
    if pickles[0].size > max_pickle_bytes:
        raise CheckpointError(
            f"its pickle is larger than {max_pickle_bytes} bytes; save its tensors alone, with "
            "safetensors"
        )
    for member in members:
        _verify(stream, member)
    stream.seek(pickles[0].begin)
    prefix = f"{roots.pop()}/data/"
    storages = {m.name.removeprefix(prefix): m.size for m in members if m.name.startswith(prefix)}
    return stream.read(pickles[0].size), storages


def _members(stream: BinaryIO, size: int) -> list[_Member]:
    count, begin, length = _directory(stream, size)
    if count > _MAX_MEMBERS or length > count * _MAX_ENTRY_BYTES:
        raise CheckpointError(
            f"the archive's directory declares {count} members in {length} bytes; {_DO_NOT_USE}"
        )
    stream.seek(begin)
    entries = list(_entries(stream.read(length), count))
    if any(name.count(b"/") == 1 and name.endswith(b"/constants.pkl") for name, _ in entries):
        raise CheckpointError(
            "a TorchScript archive; save the model's state_dict() with safetensors and load that"
        )
    members = [_member(stream, entry) for entry in entries]
    # PyTorch's reader ignores case.
    if len({member.name.lower() for member in members}) != len(members):
        raise CheckpointError(f"the archive holds a member twice; {_DO_NOT_USE}")
    declared = sum(member.size for member in members)
    if declared > size:
        raise CheckpointError(
            f"the archive's members declare {declared} bytes, the file has {size}; {_DO_NOT_USE}"
        )
    position = 0
    for member in sorted(members, key=lambda member: member.start):
        gap = member.start - position
        if gap < 0 or gap > (_DESCRIPTOR_BYTES if position else 0):
            what = "overlaps another" if gap < 0 else "follows bytes that belong to no member"
            raise CheckpointError(f"the member {member.name[:80]!r} {what}; {_DO_NOT_USE}")
        position = member.end
    if not 0 <= begin - position <= _DESCRIPTOR_BYTES:
        raise CheckpointError(f"the archive's members do not end at its directory; {_DO_NOT_USE}")
    return members


def _directory(stream: BinaryIO, size: int) -> tuple[int, int, int]:
    """Return the number of members and the directory's position and length."""
    tail_size = min(size, 22 + 20 + 56)
    stream.seek(size - tail_size)
    tail = stream.read(tail_size)
    end = size - 22
    if tail[-22:-18] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        raise CheckpointError(
            f"{_DAMAGED} (the directory at its end is missing); fetch the file again"
        )
    disk, first, here, count, length, begin = struct.unpack("<4H2I", tail[-18:-2])
    if tail[-42:-38] == b"PK\x06\x07":
        end -= 20 + 56
        place, disks = struct.unpack("<4xQI", tail[-38:-22])
        if tail_size < 98 or place != end or disks > 1 or tail[:4] != b"PK\x06\x06":
            raise CheckpointError(f"{_DAMAGED} (its zip64 directory is displaced); {_DO_NOT_USE}")
        disk, first, here, count, length, begin = struct.unpack("<2I4Q", tail[16:56])
    if disk or first or here != count or begin + length != end:
        raise CheckpointError(f"{_DAMAGED} (its directory is displaced); {_DO_NOT_USE}")
    return count, begin, length


def _entries(directory: bytes, count: int) -> Iterator[tuple[bytes, tuple[int, ...]]]:
    """Yield name and (flags, method, checksum, packed size, size, attributes, position)."""
    position = 0
    for _ in range(count):
        fixed = directory[position : position + 46]
        if len(fixed) < 46 or fixed[:4] != b"PK\x01\x02":
            raise CheckpointError(f"{_DAMAGED} (its directory breaks off); fetch the file again")
        flags, method = struct.unpack("<8x2H", fixed[:12])
        checksum, packed, size, name_size, extra_size, note_size = struct.unpack(
            "<3I3H", fixed[16:34]
        )
        attributes, start = struct.unpack("<2I", fixed[38:46])
        name = directory[position + 46 : position + 46 + name_size]
        position += 46 + name_size
        extra = directory[position : position + extra_size]
        position += extra_size + note_size
        size, packed, start = _widened([size, packed, start], extra)
        yield name, (flags, method, checksum, packed, size, attributes, start)
    if position != len(directory):
        raise CheckpointError(f"{_DAMAGED} (its directory has another length); {_DO_NOT_USE}")


def _widened(values: list[int], extra: bytes) -> list[int]:
    """Replace values that did not fit 32 bits by those of the zip64 field."""
    needed = sum(value == _HUGE for value in values)
    fields: list[bytes] = []
    while len(extra) >= 4:
        kind, length = struct.unpack("<2H", extra[:4])
        if kind == 1:
            fields.append(extra[4 : 4 + length])
        extra = extra[4 + length :]
    if not needed:
        return values
    if len(fields) != 1 or len(fields[0]) != 8 * needed:
        raise CheckpointError(f"{_DAMAGED} (a zip64 field is wrong); {_DO_NOT_USE}")
    wide = iter(struct.unpack(f"<{needed}Q", fields[0]))
    return [next(wide) if value == _HUGE else value for value in values]


def _member(stream: BinaryIO, entry: tuple[bytes, tuple[int, ...]]) -> _Member:
    raw, (flags, method, checksum, packed, size, attributes, start) = entry
    name = raw.decode("utf-8", errors="replace")
    if (
        not name.isprintable()
        or set("\\\ufffd") & set(name)
        or {"", ".", ".."} & {*name.split("/")}
    ):
        raise CheckpointError(
            f"the archive holds a member with the odd path {name[:80]!r}; {_DO_NOT_USE}"
        )
    if stat.S_ISLNK(attributes >> 16):
        raise CheckpointError(f"the member {name[:80]!r} is a symbolic link; {_DO_NOT_USE}")
    if method or flags & 1:
        raise CheckpointError(
            f"the archive's member {name[:80]!r} is compressed or encrypted; torch.save does "
            "neither: unpack it and pack it again with 'zip -0 -r -D'"
        )
    stream.seek(start)
    header = stream.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{_DAMAGED} (member {name[:80]!r}); fetch the file again")
    local_flags, local_method = struct.unpack("<6x2H", header[:10])
    local_packed, local_size, name_size, extra_size = struct.unpack("<2I2H", header[18:30])
    # 0: written behind the bytes instead, as the flag says; huge: in the zip64 field.
    vague = {_HUGE, 0} if local_flags & 8 else {_HUGE}
    same = {local_packed, local_size} <= {size, *vague}
    if packed != size or local_method or not same or stream.read(name_size) != raw:
        raise CheckpointError(
            f"{_DAMAGED} (member {name[:80]!r} is described in two ways); {_DO_NOT_USE}"
        )
    return _Member(name, start, start + 30 + name_size + extra_size, size, checksum)


def _verify(stream: BinaryIO, member: _Member) -> None:
    # 0 stands for "not computed" (torch.serialization.set_crc32_options).
    if not member.checksum:
        return
    stream.seek(member.begin)
    checksum, left = 0, member.size
    while left:
        block = stream.read(min(left, 1 << 20))
        if not block:
            raise CheckpointError(f"{_DAMAGED} (member {member.name!r}); fetch the file again")
        checksum = zlib.crc32(block, checksum)
        left -= len(block)
    if checksum != member.checksum:
        raise CheckpointError(
            f"{_DAMAGED} (the CRC of {member.name!r} is wrong); fetch the file again"
        )
