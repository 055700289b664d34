"""Reads and validates ``weights_manifest.yaml``: every released checkpoint, where and whose it is.

This module imports no torch and opens no connection.
"""

import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from backbones.config import YamlMapping, data_folder, read_yaml
from backbones.errors import ConfigError, UnknownModelError, nearest
from backbones.schema import fits, in_words

__all__ = ["Manifest", "WeightsEntry", "load_manifest", "read_manifest"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class WeightsEntry:
    """One checkpoint of one variant. Fields are documented at the head of the manifest."""

    variant: str
    tag: str
    where: str
    repo: str | None = None
    file: str | None = None
    revision: str | None = None
    url: str | None = None
    page: str | None = None
    status: Literal["released", "page_only", "unreleased"] = "released"
    sha256: str | None = None
    size: int | None = None
    layout: Literal["authors", "timm", "backbones", "mmpretrain", "openmixup", "transformers"] = (
        "authors"
    )
    license: str = "unstated"
    input_size: Sequence[int] = (3, 224, 224)
    test_input_size: Sequence[int] | None = None
    crop_pct: float = 0.875
    test_crop_pct: float | None = None
    crop_mode: Literal["center", "squash", "border"] = "center"
    interpolation: str = "bicubic"
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    num_classes: int | None = 1000
    top1: float | None = None
    top1_source: str | None = None
    data: str | None = None
    lacks: Sequence[str] = ()
    checked: Literal["keys", "weights"] | None = None
    note: str | None = None

    @property
    def name(self) -> str:
        """``variant.tag``."""
        return f"{self.variant}.{self.tag}"

    @property
    def available(self) -> bool:
        """Whether a program can download it."""
        return self.status == "released"

    @property
    def source(self) -> str:
        """Where a person finds it."""
        if self.repo:
            return f"hf-hub:{self.repo}" + (f"@{self.revision}" if self.revision else "")
        return self.url or self.page or "nowhere"


_HINTS = typing.get_type_hints(WeightsEntry)
ENTRY_KEYS = tuple(key for key in _HINTS if key not in ("variant", "tag", "where"))


@dataclass(frozen=True)
class Manifest:
    """All entries, by ``variant.tag``, in the file's order."""

    path: Path
    entries: Mapping[str, WeightsEntry]

    @cached_property
    def by_variant(self) -> Mapping[str, Mapping[str, WeightsEntry]]:
        """Entries by variant and tag; a variant's first tag is its default."""
        result: dict[str, dict[str, WeightsEntry]] = {}
        for entry in self.entries.values():
            result.setdefault(entry.variant, {})[entry.tag] = entry
        return result

    def tags(self, variant: str) -> list[str]:
        """Return the tags of a variant, the default first."""
        return list(self.by_variant.get(variant, {}))

    def find(self, variant: str, tag: str | None = None) -> WeightsEntry | None:
        """Return the entry of a tag, or of the default tag; None where there are no entries.

        Raises:
            UnknownModelError: the variant has entries, but none of that tag.
        """
        tags = self.by_variant.get(variant, {})
        if not tag:
            return next(iter(tags.values()), None)
        if tag not in tags:
            choices = ", ".join(tags) or "none"
            raise UnknownModelError(
                f"no weights '{variant}.{tag}'{nearest(tag, tags)} (tags of {variant}: {choices})"
            )
        return tags[tag]


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest.

    Raises:
        ConfigError: with file, line, key and the nearest valid key.
    """
    content = read_yaml(path)
    families = content.get("families")
    if content.get("version") != 1 or not isinstance(families, YamlMapping):
        raise ConfigError(f"{content.path}: expected 'version: 1' and 'families:'")
    entries: dict[str, WeightsEntry] = {}
    for family, block in families.items():
        if not isinstance(block, YamlMapping):
            raise ConfigError(f"{families.where(family)}: {family!r} must hold 'weights:'")
        defaults: Any = block.get("defaults") or {}
        weights: Any = block.get("weights") or {}
        _check(defaults, f"defaults of {family!r}")
        for name, node in weights.items():
            where = weights.where(name)
            if "." not in name or not isinstance(node, YamlMapping):
                raise ConfigError(f"{where}: expected 'variant.tag:' with indented keys")
            if name in entries:
                raise ConfigError(f"{where}: {name!r} is listed twice")
            _check(node, name)
            variant, tag = name.split(".", 1)
            entry = WeightsEntry(variant, tag, where, **{**defaults, **node})
            _check_source(entry)
            entries[name] = entry
    return Manifest(content.path, entries)


def _check(node: Any, what: str) -> None:
    for key, value in node.items():
        where = node.where(key)
        if key not in ENTRY_KEYS:
            raise ConfigError(f"{where}: {what}: unknown key {key!r}{nearest(key, ENTRY_KEYS)}")
        if not fits(value, _HINTS[key]):
            raise ConfigError(f"{where}: {what}: {key} must be {in_words(_HINTS[key])}: {value!r}")


def _check_source(entry: WeightsEntry) -> None:
    given = [key for key in ("repo", "url") if getattr(entry, key)]
    if entry.available and len(given) != 1:
        raise ConfigError(f"{entry.where}: {entry.name}: released weights need 'repo' or 'url'")
    if entry.repo and not entry.file:
        raise ConfigError(f"{entry.where}: {entry.name}: 'repo' needs 'file'")
    if entry.status == "page_only" and not entry.page:
        raise ConfigError(f"{entry.where}: {entry.name}: status page_only needs 'page'")
    for key, pattern in (("sha256", "[0-9a-f]{64}"), ("revision", "[0-9a-f]{40}")):
        value = getattr(entry, key)
        if value is not None and not re.fullmatch(pattern, value):
            raise ConfigError(f"{entry.where}: {entry.name}: {key} is not of the form {pattern}")


@lru_cache(maxsize=1)
def load_manifest() -> Manifest:
    """Return the manifest that ships with the package."""
    return read_manifest(data_folder() / "weights_manifest.yaml")
