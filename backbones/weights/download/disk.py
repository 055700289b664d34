"""What a download needs of the disk: room, a writable folder, and a digest of what arrived."""

import errno
import hashlib
import shutil
from pathlib import Path

from backbones.errors import WeightsUnavailableError

__all__ = ["require_space", "sha256_of", "unwritable"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require_space(folder: Path, needed: int | None, what: str) -> None:
    """Refuse a folder, which need not exist yet, that has no room for `needed` bytes."""
    existing = next((p for p in (folder, *folder.absolute().parents) if p.is_dir()), None)
    if needed is None or existing is None:
        return
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise WeightsUnavailableError(
            f"{what} needs {needed} bytes, {folder} has {free} free; make room, or name another"
            " place with cache_dir=... (HF_HOME for the Hub's cache)"
        )


def unwritable(folder: Path, error: OSError, what: str) -> WeightsUnavailableError:
    """Return the error to raise where `what` cannot be written under `folder`."""
    if error.errno in _FULL:
        reason = "the disk is full or the file larger than allowed; make room"
    else:
        reason = "check the rights of the folder"
    return WeightsUnavailableError(
        f"{what} cannot be kept under {folder} ({error.strerror or error}): {reason}, or name"
        " another place with cache_dir=... (HF_HOME for the Hub's cache)"
    )
