"""Reading `torch.save` files without running anything they ask for.

Two guards, one behind the other. First the pickle is followed step by step without building
anything (`PickleCheck`), and every class or function it names is compared with a short list of what
a checkpoint of tensors needs. That list is narrower than PyTorch's own, which also admits calls
that allocate any amount of memory (`bytearray`, chained encodings). Then PyTorch's weights-only
unpickler reads the file, memory-mapped.
"""

import argparse
import io
import threading
from pathlib import Path
from typing import Any

import torch

from backbones.errors import CheckpointError, UnsafeCheckpointError, first_line
from backbones.weights.untrusted.archive import read_archive
from backbones.weights.untrusted.pickle_check import PickleCheck, Refused

__all__ = ["CONVERTER", "load_archive", "load_pickle"]

CONVERTER = "scripts/convert_checkpoint.py"
# The pickles of the largest training checkpoints have a few MiB; the tensors lie outside of them.
_MAX_PICKLE_BYTES = 32 << 20
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
# A legacy file is a magic number, a version, system facts, the object and the storages' names.
_LEGACY_PICKLES = 5
_LEGACY_COUNT_BYTES = 8  # before each storage

# safe_globals changes a list of the whole process and takes its entries off it at the end.
_SAFE_GLOBALS_LOCK = threading.Lock()


def load_archive(path: Path, size: int) -> Any:
    """Read a zip archive of `torch.save`, `size` bytes long, or raise as `read_checkpoint`."""
    try:
        with path.open("rb") as stream:
            pickled, storages = read_archive(stream, size, _MAX_PICKLE_BYTES)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    check = PickleCheck(size, storages)
    _, refused = _followed(path, io.BytesIO(pickled), check, pickles=1)
    if refused:
        raise _refusal(path, refused)
    return _torch_load(path, mmap=True)


def load_pickle(path: Path, head: bytes, size: int) -> Any:
    """Read a file that starts like a pickle: PyTorch's format from before version 1.6."""
    legacy = head.startswith(_LEGACY_MAGIC)
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(_MAX_PICKLE_BYTES))
    check = PickleCheck(size)
    pickles = _LEGACY_PICKLES if legacy else 1
    keys, refused = _followed(path, stream, check, pickles=pickles)
    if not legacy:
        raise CheckpointError(
            f"{path}: a plain pickle, not written by torch.save; if you trust where it comes from, "
            f"{CONVERTER} turns it into a file that loads here"
        )
    if refused:
        raise _refusal(path, refused)
    texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not texts or sorted(keys) != sorted(check.declared):
        raise CheckpointError(f"{path}: damaged, it lists other storages than it uses; fetch again")
    needed = stream.tell() + check.declared_bytes + _LEGACY_COUNT_BYTES * len(keys)
    if needed != size:
        raise CheckpointError(
            f"{path}: damaged or cut short, {needed} bytes are declared and {size} are there; "
            "fetch the file again"
        )
    return _torch_load(path, mmap=False)


def _followed(
    path: Path, stream: io.BytesIO, check: PickleCheck, *, pickles: int
) -> tuple[Any, Refused | None]:
    """Follow pickles; return the last one's stand-in and the first thing no checkpoint does."""
    result: Any = None
    refused, damage = None, None
    for _ in range(pickles):
        try:
            result = check.follow(stream)
        except Refused as error:
            refused = refused or error
        except Exception as error:  # pickletools has no error class of its own
            damage = error
            break  # where the next pickle starts is unknown
    if check.blocked:
        names = ", ".join(sorted(check.blocked)[:8])
        raise UnsafeCheckpointError(
            f"{path}: refused, because reading it would call {names}. Nothing was run. If you trust"
            f" where the file comes from, 'python {CONVERTER} --i-trust-this-file IN "
            "OUT.safetensors' (of the project's source tree) runs it in a process of its own and"
            " keeps only the tensors; that file loads here"
        )
    if damage is not None:
        raise CheckpointError(
            f"{path}: damaged or cut short, its pickle cannot be read ({str(damage)[:200]}); "
            "fetch the file again"
        ) from damage
    return result, refused


def _refusal(path: Path, refused: Refused) -> CheckpointError:
    return CheckpointError(
        f"{path}: its pickle {refused}; do not use this file, or, if you trust where it comes from,"
        f" convert it with {CONVERTER}"
    )


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
        raise CheckpointError(
            f"{path}: damaged or cut short, or not readable by PyTorch's safe reader "
            f"({first_line(error)[:300]}); fetch the file again, or save its tensors with"
            " safetensors where it was made"
        ) from error
