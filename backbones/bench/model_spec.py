"""The model that a benchmark is about, described so that another process can build it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import nn

from backbones.engines import AGREEMENT
from backbones.errors import ConfigError, UnknownModelError, UnsupportedError
from backbones.factory import REMOTE, create_model, find_variant, is_checkpoint, load_model
from backbones.manifest import load_manifest
from backbones.registry import registry, unknown
from backbones.skeleton import StagedBackbone
from backbones.timm_bridge import as_ours
from backbones.weights import inner_module, local_copy, read_description, save_checkpoint

__all__ = ["ModelSpec", "specify_model"]


@dataclass(frozen=True)
class ModelSpec:
    """A model by name and weights.

    `weights` says in words whose they are: ``random`` (time does not depend on them), ``released``,
    or the file's. `arguments` are those of `load_model` where they hold a ``path``, else those of
    `create_model`.
    """

    name: str
    weights: str
    arguments: Mapping[str, Any]

    @property
    def agreement(self) -> float:
        """The share of images whose class int8 shall keep; fresh weights know no class."""
        return 0.0 if self.weights == "random" else AGREEMENT

    def build(self) -> nn.Module:
        """Return the model in evaluation mode."""
        if "path" in self.arguments:
            return load_model(**self.arguments)
        return create_model(**self.arguments).eval()


def specify_model(
    model: nn.Module | str | Path | None,
    folder: Path,
    *,
    checkpoint: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> ModelSpec:
    """Find out what is to be measured; arguments and errors are those of `benchmark`.

    A module's weights are put into `folder`, for the workers to read.
    """
    if model is not None and not isinstance(model, str | Path):
        if overrides or checkpoint:
            raise ConfigError("a module is measured as it is; leave checkpoint and overrides out")
        return _of_module(model, folder)
    if model is not None and is_checkpoint(model):
        if checkpoint is not None:
            raise ConfigError(f"two checkpoints: {model} and {checkpoint}; give one")
        model, checkpoint = None, model
    if checkpoint is not None:
        return _of_file(None if model is None else str(model), Path(checkpoint), overrides or {})
    if model is None:
        raise ConfigError("nothing to measure; name a model or a checkpoint")
    name = str(model)
    _check_name(name)
    released = _is_at_hand(name) and not overrides
    arguments = {"name": name, "pretrained": released, **(overrides or {})}
    return ModelSpec(name, "released" if released else "random", arguments)


def _of_module(model: nn.Module, folder: Path) -> ModelSpec:
    inner = inner_module(model)
    ours: nn.Module | None = inner if isinstance(inner, StagedBackbone) else as_ours(inner)
    if ours is None:
        raise UnsupportedError(
            f"{type(inner).__name__} is no model of this package, and cannot be rebuilt in another"
            " process; give its name, or a checkpoint that backbones.save_checkpoint wrote"
        )
    file = save_checkpoint(ours, folder / "model.safetensors")
    try:
        saved = _of_file(None, file, {})
    except ConfigError as error:
        raise UnsupportedError(
            f"{type(inner).__name__} does not say which variant it is; make it with"
            " backbones.create_model, which notes that"
        ) from error
    return ModelSpec(saved.name, "the given module's", saved.arguments)


def _of_file(name: str | None, file: Path, overrides: Mapping[str, Any]) -> ModelSpec:
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "no such file"
        raise ConfigError(f"{file}: {what}; check the path of the checkpoint")
    saved = read_description(file)
    own_name = saved.get("name")
    if name is None and own_name is None:
        raise ConfigError(f"{file} does not say which model it is of; name the model, too")
    if name is not None or saved.get("family") not in registry.classes:
        _check_name(str(name or own_name))
    arguments = {"path": str(file), "name": name, **overrides}
    return ModelSpec(str(name or own_name), str(file), arguments)


def _check_name(name: str) -> None:
    """Refuse a wrong name before any process is started."""
    if name.startswith(REMOTE) or find_variant(name)[0] is not None:
        return
    if not timm.is_model(name):
        raise UnknownModelError(unknown("model", name, [*registry.names(), *timm.list_models()]))


def _is_at_hand(name: str) -> bool:
    variant, tag = find_variant(name)
    entry = variant and load_manifest().find(variant.name, tag)
    return bool(entry and local_copy(entry))
