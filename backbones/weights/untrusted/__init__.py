"""Reading files of strangers: safetensors headers, zip archives, pickles, state dicts."""

from backbones.weights.untrusted.reading import (
    CHECKPOINT_SUFFIXES,
    Checkpoint,
    opened,
    read_checkpoint,
    read_content,
    read_description,
    read_metadata,
)
from backbones.weights.untrusted.state_dicts import unwrap

__all__ = [
    "CHECKPOINT_SUFFIXES",
    "Checkpoint",
    "opened",
    "read_checkpoint",
    "read_content",
    "read_description",
    "read_metadata",
    "unwrap",
]
