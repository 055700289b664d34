"""What an exported file says of itself, in the words of `backbones.save_checkpoint`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import resolve_model_data_config
from torch import nn

from backbones.errors import ConfigError

__all__ = ["check_input_size", "describe", "input_size_of"]


def input_size_of(model: nn.Module, asked: Sequence[int] | None = None) -> tuple[int, int, int]:
    """Return (channels, height, width) of what the model takes.

    Args:
        model: any model; its own input configuration counts where nothing is asked for.
        asked: ([channels,] height, width).

    Raises:
        ConfigError: `asked` is something else.
    """
    _, height, width = resolve_model_data_config(model)["input_size"]
    channels = getattr(model, "in_chans", None) or 3
    if asked is None:
        return (channels, height, width)
    check_input_size(asked)
    *own, height, width = asked
    return (own[0] if own else channels, height, width)


def check_input_size(asked: Sequence[int]) -> None:
    """Raise :class:`ConfigError` unless `asked` is ([channels,] height, width)."""
    is_size = isinstance(asked, Sequence) and not isinstance(asked, str)
    if not is_size or len(asked) not in (2, 3) or min(asked) < 1:
        raise ConfigError(f"input_size must be ([channels,] height, width), got {asked!r}")


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
