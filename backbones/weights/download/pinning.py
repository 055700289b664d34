"""Recording digests in the manifest, so that every later download is verified."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backbones.config import read_yaml
from backbones.errors import ConfigError
from backbones.files import new_file
from backbones.manifest import WeightsEntry, read_manifest
from backbones.weights.download.disk import sha256_of
from backbones.weights.download.fetching import fetch
from backbones.weights.download.hub import file_revision

__all__ = ["Pin", "measure_pin", "write_pin"]


@dataclass(frozen=True)
class Pin:
    """What identifies a file for good."""

    sha256: str
    size: int
    revision: str | None = None
    """The commit of the Hub repository; None for files of other servers."""


def measure_pin(entry: WeightsEntry, *, cache_dir: str | Path | None = None) -> Pin:
    """Download an entry's file and return its digest, its size and the commit it is of.

    A digest, size or revision recorded already is compared first (`fetch`).

    Raises:
        WeightsUnavailableError: the file cannot be had.
        CheckpointError: the file is not the recorded one.
    """
    revision = entry.revision
    if entry.repo and revision is None:
        revision = file_revision(entry.repo, entry.file or "")
    # The commit, not the branch: what is recorded is one state of the repository.
    path = fetch(replace(entry, revision=revision), cache_dir=cache_dir)
    return Pin(sha256_of(path), path.stat().st_size, revision)


def write_pin(manifest: str | Path, name: str, pin: Pin) -> None:
    """Write a pin into the entry ``variant.tag`` of a manifest; every other line stays as it is.

    Raises:
        ConfigError: the file has no such entry, is written in a style that cannot be changed line
            by line, or cannot be written. It is left as it was.
    """
    path = Path(manifest)
    before = read_manifest(path).entries
    if name not in before:
        raise ConfigError(f"{path}: no entry {name!r}")
    families: Any = read_yaml(path)["families"]
    keys = next(block["weights"] for block in families.values() if name in block["weights"])[name]
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    end = max(keys.lines.values())
    margin = re.match(" *", lines[end - 1])[0]  # type: ignore[index]
    while end < len(lines) and lines[end].startswith(f"{margin} "):
        end += 1  # the last value goes on
    for key, value in (("revision", pin.revision), ("sha256", pin.sha256), ("size", pin.size)):
        text = "null" if value is None else str(value)
        if key in keys:
            at = keys.lines[key] - 1
            lines[at] = re.sub(r"(:\s*)[^\s#]+", rf"\g<1>{text}", lines[at], count=1)
        elif value is not None:
            lines.insert(end, f"{margin}{key}: {text}\n")
            end += 1
    # A digest of digits alone would be read as a number, quoting styles differ, and so on.
    changed = replace(
        before[name], revision=pin.revision, sha256=pin.sha256, size=pin.size, where=""
    )
    expected = {key: replace(entry, where="") for key, entry in before.items()} | {name: changed}
    try:
        with new_file(path) as file:
            file.write_text("".join(lines), encoding="utf-8")
            after = read_manifest(file).entries
            if {key: replace(entry, where="") for key, entry in after.items()} != expected:
                raise ConfigError(
                    f"{path}: {name!r} is not written one key a line; record by hand: {pin}"
                )
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error}); check its rights") from error
