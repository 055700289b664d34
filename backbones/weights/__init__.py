"""Checkpoints: reading them safely, bringing them here, mapping them to a model, publishing."""

from backbones.weights.download import (
    check_obtainable,
    fetch,
    local_copy,
    measure_pin,
    mirror_path,
    sha256_of,
    verify,
    write_pin,
)
from backbones.weights.loading import (
    LoadReport,
    filter_for_timm,
    load_checkpoint,
    load_pretrained,
    saved_arguments,
    sizes_in_file,
)
from backbones.weights.mapping import Mapped, map_checkpoint
from backbones.weights.publish import (
    FILES,
    PublishError,
    check_repo_id,
    push_to_hub,
    save_for_hf,
)
from backbones.weights.saving import save_checkpoint
from backbones.weights.target import inner_module
from backbones.weights.untrusted import (
    CHECKPOINT_SUFFIXES,
    Checkpoint,
    read_checkpoint,
    read_content,
    read_description,
    read_metadata,
    unwrap,
)

__all__ = [
    "CHECKPOINT_SUFFIXES",
    "FILES",
    "Checkpoint",
    "LoadReport",
    "Mapped",
    "PublishError",
    "check_obtainable",
    "check_repo_id",
    "fetch",
    "filter_for_timm",
    "inner_module",
    "load_checkpoint",
    "load_pretrained",
    "local_copy",
    "map_checkpoint",
    "measure_pin",
    "mirror_path",
    "push_to_hub",
    "read_checkpoint",
    "read_content",
    "read_description",
    "read_metadata",
    "save_checkpoint",
    "save_for_hf",
    "saved_arguments",
    "sha256_of",
    "sizes_in_file",
    "unwrap",
    "verify",
    "write_pin",
]
