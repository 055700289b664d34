"""What a checkpoint given on the command line says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backbones.errors import CheckpointError, ConfigError
from backbones.weights import read_metadata

__all__ = ["describe", "model_name", "overrides_of"]


def describe(checkpoint: str, option: str = "--checkpoint") -> dict[str, Any]:
    """Return what a checkpoint saved by this package says of itself; empty for others'.

    Raises:
        ConfigError: there is no such file.
    """
    if not Path(checkpoint).is_file():
        raise ConfigError(f"{checkpoint}: no such file; check the path given as {option}")
    try:
        return dict(read_metadata(checkpoint).get("backbones") or {})
    except CheckpointError:
        return {}  # of another format; whether it is intact is seen when it is read


def model_name(given: str | None, saved: dict[str, Any], checkpoint: str) -> str:
    """Return the model to build for a checkpoint: the one named, else the one it names.

    Raises:
        ConfigError: neither is there.
    """
    name = given or saved.get("name")
    if name is None:
        raise ConfigError(f"{checkpoint} does not say which model it is of; add --model NAME")
    return str(name)


def overrides_of(saved: dict[str, Any], name: str) -> dict[str, Any]:
    """Return what model `name` must be created with besides a checkpoint's own arguments."""
    if saved.get("name") == name and not saved.get("arguments") and saved.get("classes"):
        return {"num_classes": len(saved["classes"])}  # a model of timm's own
    return {}
