"""A checkpoint of any layout as a model that can be saved or published as ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backbones import weights
from backbones.errors import CheckpointError, ConfigError
from backbones.factory import open_checkpoint
from backbones.manifest import WeightsEntry, load_manifest

__all__ = ["Conversion", "read_for_release"]


@dataclass(frozen=True)
class Conversion:
    """A checkpoint as a model, and what is to be written beside its weights."""

    model: nn.Module
    facts: Mapping[str, Any]
    """Name, layout and the like, for people."""
    beside: Mapping[str, Any]
    """License, provenance and classes, as `save_checkpoint` and `push_to_hub` take them."""


def read_for_release(
    path: str | Path,
    name: str | None = None,
    *,
    license: str | None = None,
    dtype: torch.dtype | None = None,
    rewritten: bool = False,
    version: str = "",
    **sizes: int | None,
) -> Conversion:
    """Load a checkpoint completely into the model it is of, and say where it comes from.

    Args:
        path: the file.
        name: the model, with the tag where the file is that release; None for the file's own name.
        license: license of the weights, where no tag says it.
        dtype: number type of the model; None for one that holds every number of the file.
        rewritten: whether even a file of ours becomes another one, which names it as its source.
        version: this package's version, for the provenance.
        sizes: ``num_classes`` and ``in_chans`` that the file must have; None for any.

    Raises:
        ConfigError: the file does not say which model it is of, or the license is another one.
        UnknownModelError: no such model or tag in this package.
        CheckpointError: the file does not fit, has other sizes, or its values overflow the type.
    """
    checkpoint = weights.read_checkpoint(path)
    opened = open_checkpoint(checkpoint, name, ours_only=True, dtype=dtype or _widest(checkpoint))
    for key, size in sizes.items():
        if size not in (None, found := getattr(opened.model, key)):
            raise CheckpointError(f"{path}: {key}={size} was asked for, the file has {found}")
    entry = None
    if opened.variant is not None and opened.tag:
        entry = load_manifest().find(opened.variant.name, opened.tag)
    origin = opened.saved.get("provenance")
    if rewritten or not opened.saved:
        origin = _provenance(Path(path), opened.report, entry, origin, version)
    license = _license(license, entry, opened.saved.get("license"))
    dtype = next(opened.model.parameters()).dtype
    facts = {
        "model": opened.name,
        "layout": opened.report.layout,
        "wrapper": opened.report.wrapper,
        "entries": opened.report.loaded,
        "dropped": len(opened.report.dropped),
        "dtype": str(dtype).removeprefix("torch."),
        "license": license,
    }
    beside = {
        "license": license,
        "provenance": origin,
        "classes": opened.saved.get("classes"),
    }
    return Conversion(opened.model, facts, beside)


def _widest(checkpoint: weights.Checkpoint) -> torch.dtype:
    """Return the type that holds every number of a checkpoint."""
    types = {tensor.dtype for tensor in checkpoint.tensors.values() if tensor.is_floating_point()}
    # Nothing computes in 8 bits; all of these are float16 numbers.
    wide = [torch.float16 if dtype.itemsize == 1 else dtype for dtype in types]
    return reduce(torch.promote_types, wide) if wide else torch.float32


def _license(given: str | None, entry: WeightsEntry | None, saved: str | None) -> str:
    released = entry.license if entry is not None and entry.license != "unstated" else None
    if entry is not None and given and released and given.lower() != released:
        raise ConfigError(
            f"--license {given}: {entry.name} was released under {released}; leave the option out,"
            " or name the model without the tag where the weights are your own"
        )
    return released or given or saved or "unstated"


def _provenance(
    path: Path,
    report: weights.LoadReport,
    entry: WeightsEntry | None,
    before: Any,
    version: str,
) -> dict[str, Any]:
    digest = weights.sha256_of(path)
    facts: dict[str, Any] = {
        "converted from": path.name,
        "sha256": digest,
        "size": path.stat().st_size,
        "layout": report.layout,
        "wrapper": report.wrapper,
        "prefix": report.prefix or None,
        "by": f"backbones {version}".strip(),
    }
    if entry is not None:
        facts["release"] = entry.name
        facts["released at"] = entry.source
        if entry.sha256 is not None:
            facts["is the released file"] = digest == entry.sha256
        if entry.lacks:
            facts["lacks"] = list(entry.lacks)
    if before:
        facts["before"] = before
    return {key: value for key, value in facts.items() if value is not None}
