"""Bringing a released checkpoint to this machine, and saying whether it is the right file."""

import logging
import os
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch

from backbones.errors import CheckpointError, WeightsUnavailableError
from backbones.manifest import WeightsEntry
from backbones.weights.download.disk import sha256_of
from backbones.weights.download.http import download
from backbones.weights.download.hub import EntryMissingError, cached_file, hub_file

__all__ = [
    "MIRROR",
    "REQUIRE_DIGEST",
    "check_obtainable",
    "fetch",
    "local_copy",
    "mirror_path",
    "verify",
]

_logger = logging.getLogger(__name__)
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
MIRROR = "BACKBONES_WEIGHTS_DIR"
REQUIRE_DIGEST = "BACKBONES_REQUIRE_DIGEST"


def check_obtainable(source: WeightsEntry, cache_dir: str | Path | None = None) -> None:
    """Raise what `fetch` would before it asks a server, so that no model is built in vain.

    Raises:
        WeightsUnavailableError: nothing was released, or the release is a web page, and there is no
            copy on this machine.
        CheckpointError: no digest is recorded, and one is required.
    """
    if not source.available and local_copy(source, cache_dir) is None:
        raise WeightsUnavailableError(_why_unavailable(source))
    if source.sha256 is None and _digest_required():
        raise CheckpointError(
            f"{source.name}: {REQUIRE_DIGEST} is set and no digest is recorded; record it with"
            f" 'backbones weights lock {source.name}', or pass checkpoint_path=... with a file you"
            " trust"
        )


def fetch(
    source: WeightsEntry | Any, *, cache_dir: str | Path | None = None, again: bool = False
) -> Path:
    """Return the path of a verified local file that holds the weights.

    Looked for in this order: the folder named by `BACKBONES_WEIGHTS_DIR` (see `mirror_path`), the
    cache, the network. With a recorded digest, which is always compared, a file in the cache needs
    no network. Without one a warning names the command that records it, or, with
    `BACKBONES_REQUIRE_DIGEST=1`, the file is refused.

    Args:
        source: a manifest entry, or timm's `PretrainedCfg` of weights that are not in it.
        cache_dir: where downloads are kept; None for the Hub's cache and `torch.hub`'s folder.
        again: download even if the file is in the cache.

    Raises:
        WeightsUnavailableError: nothing was released, the release is a web page, or the file
            cannot be reached. The message names the place and the way out.
        CheckpointError: the file's digest or size is not the recorded one, or none is recorded
            and one is required. Nothing of the user's is removed.
    """
    if not isinstance(source, WeightsEntry):
        return _fetch_described(source, cache_dir)
    check_obtainable(source, cache_dir)
    copy = local_copy(source, cache_dir)
    if copy is not None and not (again and source.available):
        verify(copy, source)
        if source.sha256 or source.url or not source.available or _is_mirrored(copy, source):
            return copy
    if source.repo:
        path = hub_file(
            source.repo,
            source.file or HUB_FILES[0],
            source.revision,
            cache_dir=cache_dir,
            sha256=source.sha256,
            size=source.size,
            again=again,
        )
    else:
        path = download(
            source.url or "",
            _url_path(source, cache_dir),
            sha256=source.sha256,
            size=source.size,
            again=again,
        )
    verify(path, source)
    return path


def local_copy(entry: WeightsEntry, cache_dir: str | Path | None = None) -> Path | None:
    """Return where the entry's file lies on this machine, without network; None if nowhere.

    Raises:
        WeightsUnavailableError: `BACKBONES_WEIGHTS_DIR` names no folder.
    """
    mirror = os.environ.get(MIRROR)
    if mirror:
        if not Path(mirror).is_dir():
            raise WeightsUnavailableError(
                f"{MIRROR}={mirror} is no folder; unset it, or name one that holds weights"
            )
        for path in _mirror_paths(entry, Path(mirror)):
            if path.is_file():
                return path
    if entry.repo:
        return cached_file(entry.repo, entry.file or HUB_FILES[0], entry.revision, cache_dir)
    if entry.url and (path := _url_path(entry, cache_dir)).is_file():
        return path
    return None


def mirror_path(entry: WeightsEntry, folder: Path) -> Path:
    """Return where a mirror folder keeps an entry's file: ``<variant.tag>/<file>``.

    `BACKBONES_WEIGHTS_DIR` also finds ``<owner>/<repo>/<file>``, as a copy of Hub repositories has
    it, and ``<variant.tag>`` with the suffix ``.safetensors``, ``.pth``, ``.pt`` or ``.bin``.
    """
    return folder / entry.name / _file_name(entry)


def verify(path: Path, entry: WeightsEntry) -> None:
    """Compare a file with the recorded size and digest; warn once where none is recorded.

    Raises:
        CheckpointError: they differ; the message names both. The file is left alone.
    """
    size = path.stat().st_size
    way_out = f"fetch it again with 'backbones weights fetch {entry.name} --again'"
    if entry.size is not None and size != entry.size:
        raise CheckpointError(
            f"{path}: {size} bytes, but {entry.name} has {entry.size}; not loaded: {way_out}"
        )
    if entry.sha256 is None:
        _warn_unpinned(entry.name, entry.source)
        return
    digest = sha256_of(path)
    if digest != entry.sha256:
        raise CheckpointError(
            f"{path}: sha256 {digest}, but {entry.name} has {entry.sha256}; not loaded: {way_out}"
        )


def _digest_required() -> bool:
    return os.environ.get(REQUIRE_DIGEST, "").lower() not in ("", "0", "false", "no")


@cache
def _warn_unpinned(name: str, source: str) -> None:
    _logger.warning(
        "%s: no digest is recorded, so %s was not verified; 'backbones weights lock %s' records it",
        name,
        source,
        name,
    )


def _why_unavailable(entry: WeightsEntry) -> str:
    way = f"pass checkpoint_path=... once you have the file (layout: {entry.layout})"
    note = f" ({entry.note})" if entry.note else ""
    if entry.status == "page_only":
        return f"{entry.name} cannot be downloaded by a program; visit {entry.page} and {way}{note}"
    return f"weights of {entry.variant} were never released{note}; train your own, or {way}"


def _fetch_described(cfg: Any, cache_dir: str | Path | None) -> Path:
    if cfg.file:
        path = Path(cfg.file)
        if not path.is_dir():
            return path
        for name in HUB_FILES:
            if (path / name).is_file():
                return path / name
        raise WeightsUnavailableError(f"{path} holds none of {', '.join(HUB_FILES)}")
    if not cfg.hf_hub_id:
        name = cfg.architecture or "this model"
        raise WeightsUnavailableError(
            f"no released weights are known for {name}; pass checkpoint_path=... or"
            " pretrained=False"
        )
    if _digest_required():
        raise CheckpointError(
            f"hf-hub:{cfg.hf_hub_id}: {REQUIRE_DIGEST} is set and only files of the weights"
            " manifest have digests; pass checkpoint_path=... with a file you trust"
        )
    repo, _, revision = cfg.hf_hub_id.partition("@")
    files = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else HUB_FILES
    for file in files[:-1]:
        try:
            return hub_file(repo, file, revision or None, cache_dir=cache_dir)
        except EntryMissingError:
            continue
    return hub_file(repo, files[-1], revision or None, cache_dir=cache_dir)


def _mirror_paths(entry: WeightsEntry, folder: Path) -> list[Path]:
    paths = [mirror_path(entry, folder)]
    if entry.repo:
        paths.append(folder / entry.repo / (entry.file or HUB_FILES[0]))
    suffixes = (".safetensors", ".pth", ".pt", ".bin")
    return [*paths, *(folder / f"{entry.name}{suffix}" for suffix in suffixes)]


def _is_mirrored(path: Path, entry: WeightsEntry) -> bool:
    mirror = os.environ.get(MIRROR)
    return bool(mirror) and path in _mirror_paths(entry, Path(mirror or ""))


def _url_path(entry: WeightsEntry, cache_dir: str | Path | None) -> Path:
    folder = Path(cache_dir or torch.hub.get_dir()) / "backbones" / entry.name
    return folder / _file_name(entry)


def _file_name(entry: WeightsEntry) -> str:
    """Return the last part of the file's name, as a name that any file system takes."""
    name = entry.file or unquote(urlparse(entry.url or "").path)
    return re.sub(r"[^0-9A-Za-z._-]", "_", name.rpartition("/")[2]).lstrip(".") or "checkpoint"
