"""Loading checkpoints into models: all or nothing, and with a report of what happened."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from timm.models import adapt_input_conv
from torch import Tensor, nn

from backbones.errors import CheckpointError
from backbones.manifest import WeightsEntry
from backbones.reparameterization import reparameterize
from backbones.weights.download import fetch
from backbones.weights.mapping import Mapped, map_checkpoint
from backbones.weights.target import Target, inner_module
from backbones.weights.untrusted import Checkpoint, read_checkpoint, unwrap_all

__all__ = ["LoadReport", "filter_for_timm", "load_checkpoint", "load_pretrained"]

_logger = logging.getLogger(__name__)


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
    its backbone must be complete, the rest is ignored and listed. A re-parameterized model takes
    files saved in that form, and any other by merging them on the way.

    Args:
        model: a model of this package, or any module.
        source: a safetensors or `torch.save` file, or a dict as such a file holds: authors',
            timm's or our own layout, in any wrapper (`unwrap`), with any prefix.
        strict: False tolerates missing and unexpected entries, which are then in the report;
            never wrong shapes, nor a checkpoint of which nothing fits.

    Raises:
        WeightsUnavailableError: there is no such file (also a `FileNotFoundError`).
        UnsafeCheckpointError: reading the file would run code.
        CheckpointError: the file cannot be read, or does not fit the model.
    """
    return _load(model, _checkpoint(source), strict=strict)


def load_pretrained(
    model: nn.Module,
    source: str | PathLike[str] | Checkpoint | WeightsEntry | Any,
    *,
    lacks: Sequence[str] = (),
    new_classifier: bool = False,
    deploy: bool = False,
    cache_dir: str | Path | None = None,
) -> LoadReport:
    """Load weights into a fresh model, adapting what the user asked to differ.

    The first convolution is adapted to the model's input channels as timm does. Everything else
    must fit completely; the model is unchanged when it does not.

    Args:
        model: the model, with or without `features_only`.
        source: a file, a checkpoint that was read, or what is first brought to this machine: a
            manifest entry, or timm's `PretrainedCfg`.
        lacks: parts that the file is known not to hold: ``classifier``, ``head``.
        new_classifier: the user chose the number of classes; a classifier of another width in the
            file is left out and the model keeps its fresh one.
        deploy: the model will be re-parameterized; a file that is already does so first.
        cache_dir: where downloads are kept.

    Raises:
        WeightsUnavailableError: there are no such weights, or they cannot be had.
        CheckpointError: the file cannot be read or does not fit.
    """
    if isinstance(source, str | PathLike | Checkpoint):
        checkpoint = _checkpoint(source)
    else:
        checkpoint = read_checkpoint(fetch(source, cache_dir=cache_dir))
    if deploy and checkpoint.deploy:
        # Nothing to verify here: what is merged is overwritten by the file.
        reparameterize(model.eval(), inplace=True, verify=False)
    return _load(
        model,
        checkpoint,
        strict=not lacks,
        lacks=lacks,
        ignore_classifier=new_classifier,
        adapt_input=True,
    )


def _load(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    strict: bool,
    lacks: Sequence[str] = (),
    ignore_classifier: bool = False,
    adapt_input: bool = False,
) -> LoadReport:
    """Map a checkpoint to the model, adapt what may differ, and only then copy."""
    target = Target(model)
    body: Any = target.module
    if any(tensor.is_meta for tensor in target.present.values()):
        raise CheckpointError(
            f"{checkpoint.source}: cannot be loaded, the model is on the meta device and has no"
            " memory for values; call model.to_empty(device=...) first"
        )
    options: dict[str, Any] = {"ignore_classifier": ignore_classifier}
    if adapt_input:
        options["any_input_channels"] = [f"{body.first_conv}.weight"]
    into = _map_to_deploy_form if target.deployed else _map
    mapped = into(checkpoint, model, strict=strict, **options)
    if lacks:
        _require_known_gaps(mapped, target, lacks, checkpoint.source)
    tensors, other_width = dict(mapped.tensors), []
    for key, tensor in mapped.tensors.items():
        if ignore_classifier and target.is_classifier(key):
            if tensor.shape != target.present[key].shape:
                _logger.info(
                    "%s: %s has another width; the model's own stays", checkpoint.source, key
                )
                other_width.append(key)
                del tensors[key]
        elif key in options.get("any_input_channels", ()):
            tensors[key] = adapt_input_conv(body.in_chans, tensor, base_chans=tensor.shape[1])
    body.load_state_dict(tensors, strict=False)
    return LoadReport(
        checkpoint.source,
        mapped.layout,
        checkpoint.wrapper,
        mapped.prefix,
        len(tensors),
        (*mapped.dropped, *other_width),
        (*mapped.ignored, *checkpoint.others),
        mapped.missing,
        mapped.unexpected,
    )


def _require_known_gaps(mapped: Mapped, target: Target, lacks: Sequence[str], source: str) -> None:
    """Refuse a file that lacks more than it is known to lack."""
    parts = (*target.classifiers, *(("head",) if "head" in lacks else ()))
    absent = [k for k in mapped.missing if not k.startswith(tuple(f"{p}." for p in parts))]
    if absent or mapped.unexpected:
        raise CheckpointError(
            f"{source}: does not fit {target.name}; missing {absent[:4]}, unexpected"
            f" {list(mapped.unexpected[:4])}"
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
    channels = [f"{name}.weight" for name in names]
    return _map(checkpoint, model, ignore_classifier=True, any_input_channels=channels).tensors


def _checkpoint(source: Any, label: str = "the given dict") -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, str | PathLike):
        return read_checkpoint(source)
    try:
        tensors, wrapper, others = unwrap_all(source)
    except CheckpointError as error:
        raise CheckpointError(f"{label}: {error}") from error
    return Checkpoint(tensors, {}, wrapper, others, label)


def _map_to_deploy_form(checkpoint: Checkpoint, model: nn.Module, **options: Any) -> Mapped:
    """Map a checkpoint of either form to a re-parameterized model."""
    try:
        return _map(checkpoint, model, **{**options, "strict": True})
    except CheckpointError:
        if checkpoint.deploy:
            raise
    inner: Any = inner_module(model)
    dtype = next(inner.parameters()).dtype
    twin = type(inner)(**inner.arguments).to(dtype).eval()  # in training form
    mapped = _map(checkpoint, twin, **options)
    twin.load_state_dict(mapped.tensors, strict=False)
    reparameterize(twin, inplace=True, verify=False)
    own = inner.state_dict().keys()
    merged = {key: value for key, value in twin.state_dict().items() if key in own}
    return replace(mapped, tensors=merged)


def _map(checkpoint: Checkpoint, model: nn.Module, **options: Any) -> Mapped:
    target = Target(model)
    target.require_form(checkpoint)
    target.require_arguments(checkpoint)
    for key, tensor in checkpoint.tensors.items():
        if tensor.is_meta:
            raise CheckpointError(f"{checkpoint.source}: entry {key[:80]!r} has no values (meta)")
    try:
        return map_checkpoint(checkpoint.tensors, model, **options)
    except CheckpointError as error:
        raise type(error)(f"{checkpoint.source}: {error}") from error
