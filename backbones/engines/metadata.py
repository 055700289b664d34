"""What an exported file says of itself, in the words of `backbones.save_checkpoint`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import resolve_model_data_config
from torch import nn

__all__ = ["describe", "input_size_of"]


def input_size_of(model: nn.Module) -> tuple[int, int, int]:
    """Return (channels, height, width) of the model's own input configuration."""
    _, height, width = resolve_model_data_config(model)["input_size"]
    channels = getattr(model, "in_chans", None) or 3
    return (channels, height, width)


def describe(
    model: nn.Module,
    size: Sequence[int],
    classes: Sequence[str] | None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return name, arguments, license, provenance, classes and preprocessing as JSON values.

    `input` is what ``timm.data.create_transform`` takes, so that a reader of the file needs
    nothing else to prepare an image.
    """
    config: Mapping[str, Any] = getattr(model, "config", None) or {}
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    source = {key: cfg[key] for key in ("hf_hub_id", "url", "tag") if cfg.get(key)}
    return {
        "name": config.get("name") or cfg.get("architecture"),
        "arguments": config.get("arguments"),
        "license": cfg.get("license"),
        "provenance": dict(provenance) if provenance is not None else source or None,
        "classes": None if classes is None else list(classes),
        "input": {**resolve_model_data_config(model), "input_size": list(size)},
    }
