"""Loading released weights into a model with another classifier or other input channels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from os import PathLike
from typing import Any

from timm.models import adapt_input_conv
from torch import nn

from backbones.errors import CheckpointError
from backbones.weights.loading import LoadReport
from backbones.weights.mapping import map_checkpoint
from backbones.weights.target import Target
from backbones.weights.untrusted.reading import read_checkpoint, read_metadata

__all__ = ["is_deploy_file", "load_pretrained"]

_logger = logging.getLogger(__name__)


def load_pretrained(
    model: nn.Module,
    source: str | PathLike[str],
    *,
    lacks: Sequence[str] = (),
    new_classifier: bool = False,
) -> LoadReport:
    """Load a checkpoint file, adapting what the user asked to differ.

    The first convolution is adapted to the model's input channels as timm does. Everything else
    must fit completely; the model is unchanged when it does not.

    Args:
        model: a model of this package, with or without `features_only`.
        source: the local file.
        lacks: parts that the file is known not to hold: ``classifier``, ``head``.
        new_classifier: the user chose the number of classes; a classifier of another width in the
            file is left out and the model keeps its fresh one.

    Raises:
        CheckpointError: the file cannot be read or does not fit.
    """
    checkpoint = read_checkpoint(source)
    target = Target(model)
    target.require_form(checkpoint)
    body: Any = target.module
    first_conv = f"{body.first_conv}.weight"
    try:
        mapped = map_checkpoint(
            checkpoint.tensors,
            model,
            strict=not lacks,
            ignore_classifier=new_classifier,
            any_input_channels=[first_conv],
        )
    except CheckpointError as error:
        raise type(error)(f"{source}: {error}") from error
    prefixes = [*target.classifiers, *(("head",) if "head" in lacks else ())]
    absent = [k for k in mapped.missing if not k.startswith(tuple(f"{p}." for p in prefixes))]
    if absent or mapped.unexpected:
        raise CheckpointError(
            f"{source}: does not fit {target.name}; missing {absent[:4]}, unexpected"
            f" {list(mapped.unexpected[:4])}"
        )
    tensors = dict(mapped.tensors)
    dropped = [
        key
        for key, tensor in tensors.items()
        if target.is_classifier(key) and tensor.shape != target.present[key].shape
    ]
    for key in dropped:
        _logger.info("%s: %s has another width; the model's own is kept", source, key)
        del tensors[key]
    if first_conv in tensors:
        weight = tensors[first_conv]
        tensors[first_conv] = adapt_input_conv(body.in_chans, weight, base_chans=weight.shape[1])
    body.load_state_dict(tensors, strict=False)
    return LoadReport(
        str(source),
        mapped.layout,
        checkpoint.wrapper,
        mapped.prefix,
        len(tensors),
        (*mapped.dropped, *dropped),
        (*mapped.ignored, *checkpoint.others),
        mapped.missing,
    )


def is_deploy_file(path: str | PathLike[str]) -> bool:
    """Whether `save_checkpoint` wrote a file from a model in deploy form."""
    try:
        return bool((read_metadata(path).get("backbones") or {}).get("deploy"))
    except CheckpointError:
        return False  # no safetensors file; whether it is a checkpoint at all is seen when read
