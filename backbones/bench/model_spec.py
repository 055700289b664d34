"""The model that a benchmark is about, in words that a child process understands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from torch import nn

from backbones.errors import ConfigError, UnknownModelError, UnsupportedError
from backbones.factory import REMOTE, find_variant
from backbones.manifest import load_manifest
from backbones.registry import registry, unknown
from backbones.skeleton import StagedBackbone
from backbones.timm_bridge import as_ours
from backbones.weights import inner_module, local_copy, read_description, save_checkpoint

__all__ = ["Subject", "resolve"]

CHECKPOINTS = (".safetensors", ".pth", ".pt", ".bin", ".tar")


@dataclass(frozen=True)
class Subject:
    """A model: `create` are the arguments of `create_model`, `input` what its file says of input.

    `weights` says whose they are: ``random`` (time does not depend on them), ``released``, or the
    file's.
    """

    name: str
    create: Mapping[str, Any]
    weights: str
    input: Mapping[str, Any] = field(default_factory=dict)


def resolve(
    model: nn.Module | str | Path | None,
    folder: Path,
    *,
    checkpoint: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Subject:
    """Find out what is to be measured.

    Args:
        model: a module of this package (or timm's own instance of a model that this package has),
            a name, or a checkpoint; None for the model that `checkpoint` names.
        folder: where a module's weights may be put for the children to read.
        checkpoint: a local file with the weights of the model named.
        overrides: further arguments of `create_model`.

    Raises:
        UnsupportedError: a module of another kind.
        UnknownModelError: no such model.
        ConfigError: no such file, a file that does not say which model it is of, or overrides for a
            module.
    """
    if isinstance(model, nn.Module):
        if overrides or checkpoint:
            raise ConfigError("a module is measured as it is; leave checkpoint and overrides out")
        return _of_module(model, folder)
    if isinstance(model, Path) or (model is not None and Path(model).suffix in CHECKPOINTS):
        if checkpoint is not None:
            raise ConfigError(f"two checkpoints: {model} and {checkpoint}; give one")
        model, checkpoint = None, model
    if checkpoint is not None:
        return _of_file(model, Path(checkpoint), overrides or {})
    if model is None:
        raise ConfigError("nothing to measure; name a model or a checkpoint")
    _check_name(model)
    released = _is_at_hand(model) and not overrides
    create = {"name": model, "pretrained": released, **(overrides or {})}
    return Subject(model, create, "released" if released else "random")


def _of_module(model: nn.Module, folder: Path) -> Subject:
    inner = inner_module(model)
    ours: nn.Module | None = inner if isinstance(inner, StagedBackbone) else as_ours(inner)
    if ours is None:
        raise UnsupportedError(
            f"{type(inner).__name__} is no model of this package, and cannot be rebuilt in another"
            " process; give its name, or a checkpoint that backbones.save_checkpoint wrote"
        )
    file = save_checkpoint(ours, folder / "model.safetensors")
    try:
        found = _of_file(None, file, {})
    except ConfigError as error:
        raise UnsupportedError(
            f"{type(inner).__name__} does not say which variant it is; make it with"
            " backbones.create_model, which notes that"
        ) from error
    return Subject(found.name, found.create, "the given module's", found.input)


def _of_file(name: str | None, file: Path, overrides: Mapping[str, Any]) -> Subject:
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; check the path of the checkpoint")
    saved = read_description(file)
    own = saved.get("name")
    name = name or own
    if name is None:
        raise ConfigError(f"{file} does not say which model it is of; name the model, too")
    _check_name(name)
    create: dict[str, Any] = {"name": name, "checkpoint_path": str(file)}
    variant = find_variant(name)[0]
    same = own is not None and own in (name, variant and variant.name)
    if same and not saved.get("arguments") and saved.get("classes"):
        create["num_classes"] = len(saved["classes"])  # a model of timm's own
    if saved.get("deploy"):
        create["deploy"] = True
    known = saved.get("input") or {} if same else {}
    return Subject(name, {**create, **overrides}, str(file), known)


def _check_name(name: str) -> None:
    """Refuse a wrong name before any process is started."""
    if name.startswith(REMOTE) or find_variant(name)[0] is not None or name in registry.classes:
        return
    if not timm.is_model(name):
        raise UnknownModelError(unknown("model", name, [*registry.names(), *timm.list_models()]))


def _is_at_hand(name: str) -> bool:
    variant, tag = find_variant(name)
    entry = variant and load_manifest().find(variant.name, tag)
    return bool(entry and local_copy(entry))
