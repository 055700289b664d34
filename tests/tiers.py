"""Which variants a test runs over by default and which only with ``-m slow``.

Tiers follow the parameter count on the meta device, never lists of names.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from torch.overrides import TorchFunctionMode

import backbones
from backbones.manifest import load_manifest
from backbones.registry import registry
from backbones.schema import constructor_hints

GOLDEN_LIMIT = 16e6  # parameters of the models whose golden files are compared by default
DEFAULT_LIMIT = 10e6  # of other variants than the smallest of their family
INITIALIZERS = frozenset(
    "kaiming_uniform_ uniform_ normal_ constant_ erfinv_ mul_ add_ clamp_ fill_ zero_".split()
)


class WithoutInitialization(TorchFunctionMode):
    """Models on the meta device have no values; initializing them takes half of building them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        target = args[0] if args else (kwargs or {}).get("tensor")
        if function.__name__ in INITIALIZERS and getattr(target, "is_meta", False):
            return target
        return function(*args, **(kwargs or {}))


@cache
def parameters_of(name: str) -> int:
    variant = registry.variants[name]
    with WithoutInitialization():
        model = registry.classes[variant.family](**variant.arguments, device="meta")
    return sum(p.numel() for p in model.parameters())


def by_size() -> list[Any]:
    """Every variant; slow are those above the limit, but for the smallest of a family."""
    default = {name for name in backbones.list_models() if parameters_of(name) <= DEFAULT_LIMIT}
    return _slow_but(default | {*smallest_of_each_family()})


def representatives() -> list[Any]:
    """The smallest variant of each distinct set of structural arguments.

    Two variants of a family are alike in structure when they differ only in widths and depths.
    What `by_size` leaves to the slow tier stays there.
    """
    smallest: dict[Any, str] = {}
    for name in backbones.list_models():
        key = _structure(name)
        if key not in smallest or parameters_of(name) < parameters_of(smallest[key]):
            smallest[key] = name
    return [param for param in by_size() if param.values[0] in smallest.values()]


def _slow_but(default: set[str]) -> list[Any]:
    return [
        pytest.param(name, marks=[] if name in default else [pytest.mark.slow])
        for name in backbones.list_models()
    ]


@cache
def shallow(name: str, blocks: int = 2) -> dict[str, Any]:
    """Arguments for at most so many blocks a stage, for costly tests of structure.

    Depth does not change their answer, and tracing takes as long as there are blocks.
    """
    arguments = registry.variants[name].arguments
    depths = {key: arguments[key] for key in ("depths", "focus_depths") if key in arguments}
    return {key: [min(depth, blocks) for depth in value] for key, value in depths.items()}


def smallest_of_each_family() -> list[str]:
    """The smallest variant of every family."""
    return [
        min(backbones.list_models(family=family), key=parameters_of)
        for family in backbones.list_families()
    ]


def families_by_default(large: bool = False) -> list[Any]:
    """The smallest variant of every family by default, the other `representatives` if slow.

    Those that `by_size` leaves to the slow tier are among them only if `large`.
    """
    small = set(smallest_of_each_family())
    return [
        pytest.param(p.values[0], marks=[] if p.values[0] in small else [pytest.mark.slow])
        for p in representatives()
        if large or not p.marks
    ]


def families_in_manifest() -> list[str]:
    """Families that the manifest has entries of, and which owe more than the contract.

    A family begins as one file and one YAML. Who writes entries knows what its authors published,
    so that from then on every variant has an entry, the recipes are there, and the tables of merges
    say what is merged and what is not.
    """
    listed = load_manifest().by_variant
    return sorted({variant.family for name, variant in registry.variants.items() if name in listed})


def _structure(name: str) -> Any:
    variant = registry.variants[name]
    hints, _ = constructor_hints(registry.classes[variant.family])
    sizes = {"dims", "depths", "embed_dim", "head_dim", "head_dims"}
    return variant.family, repr(
        sorted((k, v) for k, v in variant.arguments.items() if k in hints and k not in sizes)
    )


def smallest_size(model: Any) -> int:
    """The smallest valid input side: the total stride."""
    return int(model.feature_info[-1]["reduction"])
