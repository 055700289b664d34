"""Bringing a released checkpoint to this machine: the Hub, a direct URL or a local folder."""

from __future__ import annotations

import hashlib
import logging
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from backbones.errors import CheckpointError, WeightsUnavailableError
from backbones.manifest import WeightsEntry

__all__ = ["fetch"]

_logger = logging.getLogger(__name__)
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def fetch(source: WeightsEntry | Any, *, cache_dir: str | Path | None = None) -> Path:
    """Return the path of a verified local file that holds the weights.

    Args:
        source: a manifest entry, or timm's `PretrainedCfg` of weights that are not in it.
        cache_dir: where downloads are kept; None for the Hub's cache and `torch.hub`'s folder.

    Raises:
        WeightsUnavailableError: nothing was released, the release is a web page, or the file
            cannot be reached. The message names the place and the way out.
        CheckpointError: the file's digest or size is not the recorded one.
    """
    if not isinstance(source, WeightsEntry):
        return _fetch_described(source, cache_dir)
    if not source.available:
        raise WeightsUnavailableError(_why_unavailable(source))
    if source.repo:
        path = _from_hub(source.repo, source.file or HUB_FILES[0], source.revision, cache_dir)
    else:
        path = _from_url(source, cache_dir)
    _verify(path, source)
    return path


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
    repo, _, revision = cfg.hf_hub_id.partition("@")
    if cfg.hf_hub_filename:
        return _from_hub(repo, cfg.hf_hub_filename, revision or None, cache_dir)
    try:
        return _from_hub(repo, HUB_FILES[0], revision or None, cache_dir)
    except WeightsUnavailableError as error:
        if not isinstance(error.__cause__, EntryNotFoundError) or isinstance(
            error.__cause__, LocalEntryNotFoundError
        ):
            raise
        return _from_hub(repo, HUB_FILES[1], revision or None, cache_dir)


def _from_hub(repo: str, file: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    try:
        return Path(hf_hub_download(repo, file, revision=revision, cache_dir=cache_dir))
    except (HfHubHTTPError, EntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsUnavailableError(
            f"{file} of {repo} cannot be had from the Hugging Face Hub: {reason}; check the"
            " connection (HF_ENDPOINT names a mirror, HF_TOKEN gives access), or pass"
            " checkpoint_path=... with a local copy"
        ) from error


def _from_url(entry: WeightsEntry, cache_dir: str | Path | None) -> Path:
    url = entry.url or ""
    folder = Path(cache_dir or torch.hub.get_dir()) / "backbones" / entry.name
    name = entry.file or Path(urlparse(url).path).name or "checkpoint"
    path = folder / name
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=entry.sha256, progress=False)
    except RuntimeError as error:  # what torch raises for a digest that differs
        raise CheckpointError(f"{url}: {error}") from error
    except (URLError, OSError) as error:
        raise WeightsUnavailableError(
            f"{entry.name} cannot be downloaded from {url}: {error}; check the connection, or pass"
            " checkpoint_path=... with a local copy"
        ) from error
    return path


def _verify(path: Path, entry: WeightsEntry) -> None:
    if entry.size is not None and path.stat().st_size != entry.size:
        raise CheckpointError(
            f"{path}: {path.stat().st_size} bytes, but {entry.name} has {entry.size}; remove the"
            " file to fetch it again"
        )
    if entry.sha256 is None:
        _warn_unpinned(entry.name, entry.source)
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != entry.sha256:
        raise CheckpointError(
            f"{path}: sha256 {digest.hexdigest()}, but {entry.name} has {entry.sha256}; the file"
            " was not loaded; remove it to fetch it again"
        )


@cache
def _warn_unpinned(name: str, source: str) -> None:
    _logger.warning("%s: no digest is recorded, so %s was not verified", name, source)
