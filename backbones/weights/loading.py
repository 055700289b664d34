"""Loading checkpoints into models: all or nothing, and with a report of what happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

from torch import Tensor, nn

from backbones import reparam
from backbones.errors import CheckpointError
from backbones.weights.mapping import Mapped, map_checkpoint
from backbones.weights.target import Target, inner_module
from backbones.weights.untrusted.reading import Checkpoint, read_checkpoint
from backbones.weights.untrusted.state_dicts import unwrap_all

__all__ = ["LoadReport", "filter_for_timm", "load_checkpoint"]


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did. Entries are listed by their names in the model's layout."""

    source: str
    layout: str
    wrapper: str | None
    prefix: str
    loaded: int
    """Number of entries copied into the model."""
    dropped: tuple[str, ...] = ()
    """Entries the model computes itself or was built without (auxiliary heads)."""
    ignored: tuple[str, ...] = ()
    """Entries of parts this model has not, and entries that are no tensors."""
    missing: tuple[str, ...] = ()
    """Entries of the model that kept their values (only with ``strict=False``)."""
    unexpected: tuple[str, ...] = ()
    """Entries without a place in the model (only with ``strict=False``)."""

    def __str__(self) -> str:
        facts = [f"layout {self.layout}"]
        facts += [f"wrapper {self.wrapper}"] if self.wrapper else []
        facts += [f"prefix {self.prefix}"] if self.prefix else []
        lines = [f"loaded {self.loaded} entries from {self.source} ({', '.join(facts)})"]
        for what in ("dropped", "ignored", "missing", "unexpected"):
            names = getattr(self, what)
            if names:
                more = ", ..." if len(names) > 6 else ""
                lines.append(f"  {what} {len(names)}: {', '.join(names[:6])}{more}")
        return "\n".join(lines)


def load_checkpoint(
    model: nn.Module,
    source: str | PathLike[str] | Mapping[str, Any] | Checkpoint,
    *,
    strict: bool = True,
) -> LoadReport:
    """Load a checkpoint into `model`, or leave the model exactly as it was.

    Keys, shapes and values are checked before the first copy. The model keeps its device and
    number type; values are converted. A `features_only` model takes a whole model's checkpoint:
    its backbone must be complete, the rest is ignored and listed. A model in deploy form takes
    files saved in that form, and any other by merging them on the way.

    Args:
        model: a model of this package, with or without `features_only`, or any module.
        source: a safetensors or `torch.save` file, or a dict as such a file holds: authors',
            timm's or our own layout, in any wrapper (`unwrap`), with any prefix.
        strict: False tolerates missing and unexpected entries, which are then in the report;
            never wrong shapes, nor a checkpoint of which nothing fits.

    Raises:
        WeightsUnavailableError: there is no such file (also a `FileNotFoundError`).
        UnsafeCheckpointError: reading the file would run code.
        CheckpointError: the file cannot be read, or does not fit the model.
    """
    inner = inner_module(model)
    if isinstance(source, Mapping):
        label = "the given dict"
    elif isinstance(source, Checkpoint):
        label = source.source
    else:
        label = str(source)
    if any(tensor.is_meta for tensor in inner.state_dict().values()):
        raise CheckpointError(
            f"{label}: cannot be loaded, the model is on the meta device and has no memory for "
            "values; call model.to_empty(device=...) first"
        )
    checkpoint = source if isinstance(source, Checkpoint) else _checkpoint(source, label)
    if Target(model).deployed:
        mapped = _map_to_deploy_form(checkpoint, model, strict)
    else:
        mapped = _map(checkpoint, model, strict=strict)
    inner.load_state_dict(mapped.tensors, strict=False)
    return LoadReport(
        label,
        mapped.layout,
        checkpoint.wrapper,
        mapped.prefix,
        len(mapped.tensors),
        mapped.dropped,
        (*mapped.ignored, *checkpoint.others),
        mapped.missing,
        mapped.unexpected,
    )


def filter_for_timm(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Prepare a checkpoint for timm's builder: its `pretrained_filter_fn`.

    timm loads the whole model non-strictly when `num_classes` differs, and then a wrong rename
    would load nothing and only be logged. Completeness is therefore checked here, the classifier
    aside, which timm drops, and the input channels aside, which timm adapts.

    Raises:
        CheckpointError: the checkpoint does not fit. Never `TypeError`, on which timm retries.
    """
    first_conv = getattr(model, "first_conv", None) or ()
    names = (first_conv,) if isinstance(first_conv, str) else tuple(first_conv)
    checkpoint = _checkpoint(state_dict, "the pretrained weights")
    mapped = _map(
        checkpoint,
        model,
        ignore_classifier=True,
        any_input_channels=[f"{name}.weight" for name in names],
    )
    return mapped.tensors


def _checkpoint(source: Any, label: str) -> Checkpoint:
    if isinstance(source, str | PathLike):
        return read_checkpoint(source)
    try:
        tensors, wrapper, others = unwrap_all(source)
    except CheckpointError as error:
        raise CheckpointError(f"{label}: {error}") from error
    return Checkpoint(tensors, {}, wrapper, others, label)


def _map_to_deploy_form(checkpoint: Checkpoint, model: nn.Module, strict: bool) -> Mapped:
    """Map a checkpoint of either form to a re-parameterized model."""
    try:
        return _map(checkpoint, model)
    except CheckpointError:
        if checkpoint.deploy:
            raise
    inner: Any = inner_module(model)
    dtype = next(inner.parameters()).dtype
    twin = type(inner)(**inner.arguments).to(dtype).eval()  # in training form
    mapped = _map(checkpoint, twin, strict=strict)
    twin.load_state_dict(mapped.tensors, strict=False)
    reparam.reparameterize(twin, inplace=True, verify=False)
    own = inner.state_dict().keys()
    merged = {key: value for key, value in twin.state_dict().items() if key in own}
    return replace(mapped, tensors=merged)


def _map(checkpoint: Checkpoint, model: nn.Module, **options: Any) -> Mapped:
    Target(model).require_form(checkpoint)
    for key, tensor in checkpoint.tensors.items():
        if tensor.is_meta:
            raise CheckpointError(f"{checkpoint.source}: entry {key[:80]!r} has no values (meta)")
    try:
        return map_checkpoint(checkpoint.tensors, model, **options)
    except CheckpointError as error:
        raise type(error)(f"{checkpoint.source}: {error}") from error
