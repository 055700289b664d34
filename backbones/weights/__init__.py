"""Checkpoints: reading them safely, mapping them to a model, loading and saving."""

from __future__ import annotations

from backbones.weights.download.fetching import fetch, local_copy
from backbones.weights.inference import inferred_arguments, saved_arguments
from backbones.weights.loading import LoadReport, filter_for_timm, load_checkpoint
from backbones.weights.mapping import Mapped, map_checkpoint
from backbones.weights.pretrained import is_deploy_file, load_pretrained
from backbones.weights.publish.pushing import PublishError, push_to_hub, save_for_hf
from backbones.weights.saving import save_checkpoint
from backbones.weights.untrusted.reading import (
    Checkpoint,
    read_checkpoint,
    read_content,
    read_description,
    read_metadata,
)
from backbones.weights.untrusted.state_dicts import unwrap

__all__ = [
    "Checkpoint",
    "LoadReport",
    "Mapped",
    "PublishError",
    "fetch",
    "filter_for_timm",
    "inferred_arguments",
    "is_deploy_file",
    "load_checkpoint",
    "load_pretrained",
    "local_copy",
    "map_checkpoint",
    "push_to_hub",
    "read_checkpoint",
    "read_content",
    "read_description",
    "read_metadata",
    "save_checkpoint",
    "save_for_hf",
    "saved_arguments",
    "unwrap",
]
