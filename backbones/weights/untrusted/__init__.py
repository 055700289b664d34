"""Reading files of strangers: safetensors headers, zip archives, pickles, state dicts."""

from backbones.weights.untrusted.reading import (
    Checkpoint,
    read_checkpoint,
    read_content,
    read_description,
    read_metadata,
    read_shapes,
)
from backbones.weights.untrusted.state_dicts import unwrap, unwrap_all

__all__ = [
    "Checkpoint",
    "read_checkpoint",
    "read_content",
    "read_description",
    "read_metadata",
    "read_shapes",
    "unwrap",
    "unwrap_all",
]
