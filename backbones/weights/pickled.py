"""Reading `torch.save` files without running anything they ask for.

Two guards, one behind the other. First the pickle is read as text, and every class or function it
names is compared with a short list of what a checkpoint of tensors needs. That list is narrower
than PyTorch's own, which also admits calls that allocate any amount of memory (`bytearray`, chained
encodings). Then PyTorch's weights-only unpickler reads the file, memory-mapped.
"""

from __future__ import annotations

import argparse
import io
import pickletools
import struct
import threading
import zipfile
from collections import deque
from pathlib import Path
from typing import Any, NoReturn

import torch

from backbones.errors import CheckpointError, UnsafeCheckpointError

__all__ = ["load_archive", "load_pickle"]

# The pickles of the largest training checkpoints have a few MiB; the tensors lie outside of them.
_MAX_PICKLE_BYTES = 64 << 20
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
# A legacy file is a magic number, a version, system facts, the object and the storages' names.
_LEGACY_PICKLES = 5

_ALLOWED = {
    "argparse.Namespace",  # timm's training checkpoints keep their arguments
    "builtins.complex",
    "builtins.set",
    "collections.Counter",  # learning rate schedulers
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.storage.TypedStorage",
    "torch.storage.UntypedStorage",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
}

# safe_globals changes a list of the whole process and takes its entries off it at the end.
_SAFE_GLOBALS_LOCK = threading.Lock()


def load_archive(path: Path, size: int) -> Any:
    """Read a zip archive written by `torch.save`; `size` is the file's size in bytes.

    Raises:
        UnsafeCheckpointError: the archive asks to run code.
        CheckpointError: the archive is damaged, odd, or no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = _checked_pickle(path, archive, size)
    except CheckpointError:
        raise
    except Exception as error:  # whatever zipfile makes of hostile bytes
        raise CheckpointError(
            f"{path}: damaged or cut short, no readable archive ({error}); fetch the file again"
        ) from error
    _refuse_code(path, pickled, pickles=1)
    return _torch_load(path, mmap=True)


def load_pickle(path: Path, head: bytes) -> Any:
    """Read a file that starts like a pickle: PyTorch's format from before version 1.6.

    Raises:
        UnsafeCheckpointError: the pickle asks to run code.
        CheckpointError: it is damaged, or was not written by `torch.save`.
    """
    legacy = head.startswith(_LEGACY_MAGIC)
    with path.open("rb") as stream:
        pickled = stream.read(_MAX_PICKLE_BYTES)
    _refuse_code(path, pickled, pickles=_LEGACY_PICKLES if legacy else 1)
    if not legacy:
        raise CheckpointError(
            f"{path}: a plain pickle, not written by torch.save; where it can be trusted, load it "
            "there and save its tensors with safetensors"
        )
    return _torch_load(path, mmap=False)


def _checked_pickle(path: Path, archive: zipfile.ZipFile, size: int) -> bytes:
    """Check names, sizes and checksums of the archive and return its pickle."""

    def refuse(
        what: str, way_out: str = "no file of torch.save looks so, do not use it"
    ) -> NoReturn:
        raise CheckpointError(f"{path}: {what}; {way_out}")

    members = archive.infolist()
    # PyTorch's reader ignores case and takes the first of two equal names, zipfile the last.
    if len({member.orig_filename.lower() for member in members}) != len(members):
        refuse("the archive holds a member twice")
    for member in members:
        name = member.orig_filename
        parts = name.split("/")
        if not name.isprintable() or "\\" in name or {"", ".", ".."} & set(parts):
            refuse(f"the archive holds a member with the odd path {name[:80]!r}")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            refuse(
                f"the archive's member {name[:80]!r} is compressed or encrypted",
                "torch.save does neither; unpack it and pack it again with 'zip -0'",
            )
    declared = sum(member.file_size for member in members)
    if declared > size:
        refuse(f"the archive's members declare {declared} bytes, the file has {size}")

    names = {member.orig_filename for member in members}
    if any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in names):
        refuse(
            "a TorchScript archive", "save the model's state_dict() with safetensors and load that"
        )
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1 or len({name.split("/")[0] for name in names}) != 1:
        refuse(
            "a zip archive, but no checkpoint of torch.save",
            "give a .safetensors file or one written by torch.save",
        )
    if archive.getinfo(pickles[0]).file_size > _MAX_PICKLE_BYTES:
        refuse(f"its pickle is larger than {_MAX_PICKLE_BYTES} bytes")
    for member in members:
        # 0 stands for "not computed" (torch.serialization.set_crc32_options). PyTorch checks none.
        if member.CRC:
            with archive.open(member) as stream:
                while stream.read(1 << 20):
                    pass
    return _stored_bytes(path, archive.getinfo(pickles[0]))


def _stored_bytes(path: Path, member: zipfile.ZipInfo) -> bytes:
    """Read an uncompressed member; zipfile itself refuses those without a checksum."""
    with path.open("rb") as stream:
        stream.seek(member.header_offset)
        name_length, extra_length = struct.unpack("<26x2H", stream.read(30))
        stream.seek(name_length + extra_length, io.SEEK_CUR)
        return stream.read(member.file_size)


def _refuse_code(path: Path, pickled: bytes, *, pickles: int) -> None:
    """Raise if the first `pickles` pickles name anything but the parts of a checkpoint."""
    blocked: set[str] = set()
    stream = io.BytesIO(pickled)
    try:
        for _ in range(pickles):
            _collect_blocked(stream, blocked)
    except Exception as error:  # pickletools has no error class of its own
        if not blocked:
            raise CheckpointError(
                f"{path}: damaged or cut short, its pickle cannot be read ({error}); "
                "fetch the file again"
            ) from error
    if blocked:
        raise UnsafeCheckpointError(
            f"{path}: refused, because reading it would call {', '.join(sorted(blocked)[:8])}. "
            "Nothing was run. If you trust where the file comes from, load it on a machine where "
            "its code may run, keep only the tensors, and save them with "
            "safetensors.torch.save_file; that file loads here"
        )


def _collect_blocked(stream: io.BytesIO, blocked: set[str]) -> None:
    strings: deque[str] = deque(["?", "?"], maxlen=2)
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            name = ".".join(str(argument).split(" ", 1))
        elif opcode.name == "STACK_GLOBAL":
            name = ".".join(strings)
        elif opcode.name in ("EXT1", "EXT2", "EXT4"):
            name = f"copyreg extension {argument}"
        else:
            if isinstance(argument, str):
                strings.append(argument)
            continue
        if not _is_allowed(name):
            blocked.add(name[:80])


def _is_allowed(name: str) -> bool:
    module, _, attribute = name.replace("__builtin__.", "builtins.").rpartition(".")
    if module == "torch":
        # torch.float32 and its kin, torch.FloatStorage and its kin
        kind = vars(torch).get(attribute)
        if isinstance(kind, torch.dtype) or (
            isinstance(kind, type) and attribute.endswith("Storage")
        ):
            return True
    return f"{module}.{attribute}" in _ALLOWED


def _torch_load(path: Path, *, mmap: bool) -> Any:
    # PyTorch takes this extension for the other format, and maps named files only.
    misnamed = path.suffix == ".safetensors"
    try:
        with (
            _SAFE_GLOBALS_LOCK,
            torch.serialization.safe_globals([argparse.Namespace]),
            path.open("rb") as stream,
        ):
            return torch.load(
                stream if misnamed else str(path),
                map_location="cpu",
                weights_only=True,
                mmap=mmap and not misnamed,
            )
    except Exception as error:  # PyTorch raises a dozen classes on damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: damaged or cut short, or not readable by PyTorch's safe reader ({reason}); "
            "fetch the file again, or save its tensors with safetensors where it was made"
        ) from error
