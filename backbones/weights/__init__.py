"""Checkpoints: reading them safely, mapping them to a model, loading and saving."""

from __future__ import annotations

from backbones.weights.loading import LoadReport, filter_for_timm, load_checkpoint
from backbones.weights.mapping import Mapped, map_checkpoint
from backbones.weights.reading import Checkpoint, read_checkpoint, read_metadata
from backbones.weights.saving import save_checkpoint
from backbones.weights.unwrapping import unwrap

__all__ = [
    "Checkpoint",
    "LoadReport",
    "Mapped",
    "filter_for_timm",
    "load_checkpoint",
    "map_checkpoint",
    "read_checkpoint",
    "read_metadata",
    "save_checkpoint",
    "unwrap",
]
