"""What a checkpoint given on the command line says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

import backbones
from backbones.errors import ConfigError
from backbones.weights import read_description

__all__ = ["describe", "load_model", "model_name", "overrides_of"]


def describe(checkpoint: str, option: str = "--checkpoint") -> dict[str, Any]:
    """Return what a checkpoint saved by this package says of itself; empty for others'.

    Raises:
        ConfigError: there is no such file.
    """
    if not Path(checkpoint).is_file():
        raise ConfigError(f"{checkpoint}: no such file; check the path given as {option}")
    return read_description(checkpoint)


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


def load_model(
    name: str | None, checkpoint: str | None, **arguments: Any
) -> tuple[nn.Module, list[str] | None]:
    """Return a model in eval mode, with a checkpoint's or its released weights.

    Args:
        name: the model; None for the one that the checkpoint names.
        checkpoint: the file; None for released weights.
        arguments: further ones of `create_model`.

    Returns:
        The model and its class names, where the checkpoint knows them.

    Raises:
        BackbonesError: the model or its weights cannot be had.
    """
    if checkpoint is None:
        if name is None:
            raise ConfigError("name a model (--model) or a checkpoint (--checkpoint)")
        return backbones.create_model(name, pretrained=True, **arguments).eval(), None
    saved = describe(checkpoint)
    name = model_name(name, saved, checkpoint)
    arguments = {**overrides_of(saved, name), **arguments}
    if saved.get("deploy"):
        arguments["deploy"] = True
    model = backbones.create_model(name, checkpoint_path=checkpoint, **arguments).eval()
    # The name given may be an alias or a YAML file.
    built = (getattr(model, "config", None) or {}).get("name", name)
    if saved.get("name") not in (name, built):
        return model, None
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    cfg.update(saved.get("input") or {})
    return model, saved.get("classes")
