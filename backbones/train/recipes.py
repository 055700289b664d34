"""Recipes: the training options of ``configs/recipes/``, by name or from a file of one's own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import timm

from backbones.config import data_folder, read_yaml
from backbones.errors import ConfigError, UnknownModelError, nearest
from backbones.factory import find_variant
from backbones.registry import registry, unknown
from backbones.train.config import check_options

__all__ = ["Recipe", "find_recipe", "list_recipes", "read_options", "read_recipe"]

RESERVED = ("family", "global_batch_size", "like", "variants", "from_scratch", "qat")
GENERAL = "finetune"
MAX_LIKES = 8


@dataclass(frozen=True)
class Recipe:
    """Options of a run, and what differs by variant, without pretrained weights, or for `qat`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    from_scratch: Mapping[str, Any] = field(default_factory=dict)
    qat: Mapping[str, Any] = field(default_factory=dict)

    def for_model(
        self, variant: str | None, *, from_scratch: bool = False, qat: bool = False
    ) -> dict[str, Any]:
        """Return the options for a variant, the most particular last."""
        options = {**self.options, **self.variants.get(variant or "", {})}
        if from_scratch:
            options |= self.from_scratch
        if qat:
            options |= self.qat
        return options


def list_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def find_recipe(name: str | None, model: str) -> tuple[Recipe, str | None]:
    """Return the recipe asked for, and the model's variant.

    `name` is a recipe's, a YAML file, ``none``, or None for fine-tuning in the family's way.
    """
    variant, _ = find_variant(model)
    known = variant.name if variant is not None else None
    if variant is None and not timm.is_model(model) and ":" not in model:
        choices = [*registry.names(), *timm.list_models()]
        raise UnknownModelError(unknown("model", model, choices))
    if name == "none":
        return Recipe("none"), known
    if name is None:
        own = f"{variant.family}_{GENERAL}" if variant is not None else GENERAL
        name = own if own in list_recipes() else GENERAL
    return read_recipe(name), known


@cache
def read_recipe(name: str) -> Recipe:
    """Read a recipe by name or from a YAML file; ConfigError where it is none, or is wrong."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else _named(name)
    chain = [read_yaml(path)]
    while (parent := chain[-1].get("like")) is not None:
        place = chain[-1].where("like") + ": "
        if len(chain) > MAX_LIKES:
            raise ConfigError(f"{place}recipes refer to one another in a circle")
        chain.append(read_yaml(_named(str(parent), place)))
    options: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {"variants": {}, "from_scratch": {}, "qat": {}}
    for content in reversed(chain):
        check_options(content, str(path), also=RESERVED)
        for key, part in parts.items():
            found = content.get(key) or {}
            if not isinstance(found, Mapping):
                raise ConfigError(f"{content.where(key)}: {key!r} must hold 'name: value' lines")
            part.update(found)
        options |= {key: value for key, value in content.items() if key not in RESERVED}
    for situation in ("from_scratch", "qat"):
        check_options(parts[situation], str(path))
    for variant, differing in parts["variants"].items():
        if not isinstance(differing, Mapping):
            raise ConfigError(f"{path}: variant {variant!r} must hold 'option: value' lines")
        check_options(differing, f"{path}, variant {variant!r}")
    return Recipe(name, options, **parts)


def read_options(path: str | Path) -> dict[str, Any]:
    """Read the options of a ``--config`` file: flat ``option: value`` lines, ``-`` as ``_``.

    Raises:
        ConfigError: the file cannot be read, or holds an unknown option or a wrong value.
    """
    content = read_yaml(path)
    for key in [key for key in content if "-" in key]:
        content.lines[key.replace("-", "_")] = content.lines[key]
        content[key.replace("-", "_")] = content.pop(key)
    check_options(content, str(path))
    return dict(content)


def _named(name: str, place: str = "") -> Path:
    choices = list_recipes()
    if name not in choices:
        there = f"{nearest(name, choices)} (there: {', '.join(choices)})"
        raise ConfigError(f"{place}no recipe {name!r}{there}")
    return _folder() / f"{name}.yaml"


def _folder() -> Path:
    return data_folder() / "configs" / "recipes"
