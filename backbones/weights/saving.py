"""Saving models as safetensors files that say what they are."""

import json
import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import nn

from backbones.errors import CheckpointError
from backbones.files import new_file
from backbones.images import fit_channels
from backbones.weights.target import inner_module

__all__ = ["input_config", "save_checkpoint"]

_INPUT_KEYS = (
    "num_classes",
    "input_size",
    "test_input_size",
    "pool_size",
    "crop_pct",
    "test_crop_pct",
    "crop_mode",
    "interpolation",
    "mean",
    "std",
)


def save_checkpoint(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    license: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
) -> Path:
    """Save a model's state dict as safetensors, with metadata to rebuild it; return the path.

    The metadata holds one JSON object ``backbones`` with the variant's name and arguments, whether
    the weights are merged, license, provenance, class names and the input configuration
    (`read_metadata` returns it). Equal models give equal files, which appear whole or not at all.

    Args:
        model: the model, in any memory layout, on any device, also in a wrapper
            (compiled, data parallel, averaged).
        path: a name ending in ``.safetensors`` in an existing folder; an old file is replaced.
        license: license of the weights; by default that of the pretrained weights, if known.
        provenance: where the weights come from (source, digest, training), as JSON values.
        classes: names of the classes, in the classifier's order.

    Raises:
        CheckpointError: the file cannot be written, the model has no values (meta device), the
            metadata is no JSON, or there are more or fewer names than classes. Nothing is left
            behind.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: checkpoints are safetensors files; name it *.safetensors")
    if os.path.isdir(path) or not os.path.isdir(path.parent):
        missing = f"the folder {path.parent} does not exist"
        reason = "it is a folder" if os.path.isdir(path) else missing
        raise CheckpointError(f"{path}: cannot be written, {reason}; give a file in a folder")
    inner = inner_module(model)
    count = getattr(inner, "num_classes", None)
    if classes is not None and count is not None and len(classes) != count:
        raise CheckpointError(
            f"{path}: {len(classes)} names for {count} classes; give one for each"
        )
    tensors = {}
    for key, tensor in inner.state_dict().items():
        if tensor.is_meta:
            raise CheckpointError(f"{path}: nothing to save, {key!r} is on the meta device")
        # The format knows neither shared memory nor strides (channels_last), so each is copied.
        tensors[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    metadata = {
        "format": "pt",
        "backbones": _description_of(inner, path, license, provenance, classes),
    }

    try:
        with new_file(path) as file:
            file.touch()
            mode = file.stat().st_mode  # what the user's umask gives; save_file makes it private
            safetensors.torch.save_file(tensors, file, metadata)
            file.chmod(mode)
            with file.open("rb+") as stream:
                _sort_metadata(stream)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error}); check free space and rights of the folder"
        ) from error
    return path


def _sort_metadata(stream: BinaryIO) -> None:
    """Make equal models equal files: the writer puts metadata in an order that is random."""
    size = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(size))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    stream.seek(8)
    stream.write(text.ljust(size))


def input_config(model: nn.Module) -> dict[str, Any]:
    """Return what a model's preprocessing and outputs are, in timm's spelling.

    A model's own channels and classes count, not those of the weights it was created from.
    """
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    facts = {key: cfg[key] for key in _INPUT_KEYS if key in cfg}
    if "num_classes" in facts:
        facts["num_classes"] = getattr(model, "num_classes", facts["num_classes"])
    channels = getattr(model, "in_chans", None)
    return fit_channels(facts, channels) if channels else facts


def _description_of(
    model: nn.Module,
    path: Path,
    license: str | None,
    provenance: Mapping[str, Any] | None,
    classes: Sequence[str] | None,
) -> str:
    pretrained_cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    config: Mapping[str, Any] = getattr(model, "config", None) or {}
    facts = {
        "name": config.get("name") or pretrained_cfg.get("architecture"),
        "family": config.get("family"),
        "arguments": config.get("arguments"),
        "deploy": bool(getattr(model, "deployed", False)),
        "license": license or pretrained_cfg.get("license"),
        "provenance": None if provenance is None else dict(provenance),
        "classes": None if classes is None else list(classes),
        "input": input_config(model),
    }
    try:
        return json.dumps(facts, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the description of the model is no JSON ({error}); "
            "give plain strings, numbers, lists and dicts"
        ) from error
