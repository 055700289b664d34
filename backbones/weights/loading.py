"""Loading checkpoints into models: all or nothing, and with a report of what happened."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from timm.models import adapt_input_conv
from torch import Tensor, nn

from backbones.errors import CheckpointError
from backbones.manifest import WeightsEntry
from backbones.reparameterization import reparameterize
from backbones.weights.download import fetch
from backbones.weights.mapping import Mapped, Match, map_file
from backbones.weights.target import Target
from backbones.weights.untrusted import Checkpoint, opened, read_checkpoint

__all__ = [
    "LoadReport",
    "filter_for_timm",
    "load_checkpoint",
    "load_pretrained",
    "saved_arguments",
    "sizes_in_file",
]

_logger = logging.getLogger(__name__)
# A re-parameterized file holds fewer numbers than the training form of its model: parallel branches
# and norms are gone. No family merges away more than a third.
_MOST_MERGED = 4
_SLACK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class LoadReport(Match):
    """What `load_checkpoint` did."""

    source: str
    loaded: int
    """Number of entries copied into the model."""
    new: tuple[str, ...] = ()
    """Entries of a new classifier, which keep their random values."""
    assumed: tuple[str, ...] = ()
    """Arguments of the model that change what it computes, of which the file says nothing, neither
    by an entry nor by a name."""
    followed: tuple[str, ...] = ()
    """Arguments that the model took over from the entries of the file, with their new values."""

    def __str__(self) -> str:
        facts = [f"layout {self.layout}"]
        facts += [f"wrapper {self.wrapper}"] if self.wrapper else []
        facts += [f"prefix {self.prefix}"] if self.prefix else []
        facts += [f"without {', '.join(self.inner)} in names"] if self.inner else []
        lines = [f"loaded {self.loaded} entries from {self.source} ({', '.join(facts)})"]
        for what in ("dropped", "ignored", "missing", "unexpected", "new", "passed_over"):
            names = getattr(self, what)
            if names:
                more = ", ..." if len(names) > 6 else ""
                title = what.replace("_", " ")
                lines.append(f"  {title} {len(names)}: {', '.join(names[:6])}{more}")
        if self.followed:
            lines.append(f"  the model now has, as the file shows: {', '.join(self.followed)}")
        if self.assumed:
            lines.append(f"  not told by the file, as the model has it: {', '.join(self.assumed)}")
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
        model: a model of this package, or any module; also in a wrapper (compiled, data parallel,
            averaged).
        source: a safetensors or `torch.save` file, or a dict as such a file holds: authors',
            timm's or our own layout, in any wrapper (`unwrap`), with any prefix (`map_checkpoint`).
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
        source: a file, a checkpoint that was read, or what is first brought to this machine: a
            manifest entry, or timm's `PretrainedCfg`.
        lacks: parts that the file is known not to hold: ``classifier``, ``head``.
        new_classifier: the user chose the number of classes; where the file has none or one of
            another width, the model keeps its fresh one, which is reported and, for files, warned
            of.
        deploy: the model will be re-parameterized; a file that is already does so first.
        cache_dir: where downloads are kept.

    Raises:
        WeightsUnavailableError: there are no such weights, or they cannot be had.
        CheckpointError: the file cannot be read or does not fit.
    """
    is_file = isinstance(source, str | PathLike | Checkpoint)
    checkpoint = _checkpoint(source if is_file else fetch(source, cache_dir=cache_dir))
    if deploy and checkpoint.deploy:
        # Nothing to verify here: what is merged is overwritten by the file.
        reparameterize(model.eval(), inplace=True, verify=False)
    report = _load(
        model,
        checkpoint,
        strict=not lacks,
        lacks=lacks,
        ignore_classifier=new_classifier,
        adapt_input=True,
    )
    if report.new:
        _logger.log(
            logging.WARNING if is_file else logging.INFO,
            "%s: the number of classes was given, so the model has a new classifier (%s), with"
            " random values, and the rest of the file",
            report.source,
            ", ".join(report.new),
        )
    return report


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
    first_convs = target.first_convs if adapt_input else ()
    into = _map_to_deploy_form if target.deployed else map_file
    mapped = into(
        checkpoint,
        target,
        strict=strict,
        ignore_classifier=ignore_classifier,
        any_input_channels=first_convs,
    )
    if lacks:
        _require_known_gaps(mapped, target, lacks, checkpoint.source)
    classifier = [key for key in target.present if target.is_classifier(key)]
    found = {key: mapped.tensors.get(key) for key in classifier}
    whole = all(t is not None and t.shape == target.present[key].shape for key, t in found.items())
    new = classifier if ignore_classifier and not whole else []  # all of it or nothing
    tensors = {key: tensor for key, tensor in mapped.tensors.items() if key not in new}
    for key in tensors.keys() & {*first_convs}:
        channels, base = target.present[key].shape[1], tensors[key].shape[1]
        tensors[key] = adapt_input_conv(channels, tensors[key], base_chans=base)
    followed = _follow(body, mapped, target.name, checkpoint.source)
    body.load_state_dict(tensors, strict=False)
    match = {one.name: getattr(mapped, one.name) for one in fields(Match)}
    match["dropped"] = (*mapped.dropped, *(key for key in new if key in mapped.tensors))
    match["ignored"] = (*mapped.ignored, *checkpoint.others)
    return LoadReport(
        **match,
        source=checkpoint.source,
        loaded=len(tensors),
        new=tuple(new),
        assumed=target.assumed_arguments(checkpoint),
        followed=followed,
    )


def _follow(module: Any, mapped: Mapped, name: str, source: str) -> tuple[str, ...]:
    """Let a model become that of a file, as far as its family leaves it open; say so."""
    if not mapped.followed:
        return ()
    module.follow(mapped.followed)
    told = tuple(f"{key}={value}" for key, value in mapped.followed.items())
    _logger.warning("%s: shows %s with %s; the model follows", source, name, ", ".join(told))
    return told


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

    timm loads non-strictly when `num_classes` differs, and a wrong rename would then load nothing.
    Completeness is therefore checked here, classifier and input channels aside, which timm adapts.

    Raises:
        CheckpointError: the checkpoint does not fit. Never `TypeError`, on which timm retries.
    """
    target, checkpoint = Target(model), _checkpoint(state_dict, "the pretrained weights")
    mapped = map_file(
        checkpoint, target, ignore_classifier=True, any_input_channels=target.first_convs
    )
    _follow(target.module, mapped, target.name, checkpoint.source)
    return mapped.tensors


def saved_arguments(checkpoint: Checkpoint, model_class: Any) -> dict[str, Any]:
    """Return the arguments that `save_checkpoint` wrote; empty for files of any other origin.

    What a file says is data from a stranger, like its tensors: a few bytes of metadata could ask
    for a model of terabytes, or for one that takes forever to build.

    Raises:
        CheckpointError: they make no model, or one much larger than the file.
    """
    arguments = checkpoint.description.get("arguments")
    if not arguments:
        return {}

    def refusal(what: str) -> CheckpointError:
        return CheckpointError(
            f"{checkpoint.source}: describes {what}; the file is damaged or forged, do not use it"
        )

    depths = arguments.get("depths")
    counts = depths if isinstance(depths, list) else [depths]
    blocks = sum(count for count in counts if isinstance(count, int))
    if blocks > len(checkpoint.tensors):
        raise refusal(f"a model of {blocks} blocks and holds {len(checkpoint.tensors)} tensors")
    placed = {key: value for key, value in arguments.items() if key not in ("device", "dtype")}
    try:
        model = model_class(**placed, device="meta")
    except Exception as error:  # a family's constructor on a stranger's values
        raise refusal(f"no {model_class.__name__} ({error})") from error
    needed = sum(tensor.numel() for tensor in model.state_dict().values())
    stored = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    if needed > _MOST_MERGED * stored + _SLACK:
        raise refusal(f"a model of {needed} numbers and holds {stored}")
    return dict(arguments)


def sizes_in_file(checkpoint: Checkpoint, twin: nn.Module) -> dict[str, int]:
    """Return ``num_classes`` and ``in_chans`` of a file, as far as found; `twin` has any others."""
    target = Target(twin)
    options = {"ignore_classifier": True, "any_input_channels": target.first_convs}
    try:
        tensors = map_file(checkpoint, target, **options).tensors
    except CheckpointError:
        return {}  # what does not fit is named when it is loaded
    places = [("in_chans", name, 1) for name in target.first_convs[:1]]
    places += [("num_classes", f"{name}.weight", 0) for name in target.classifiers[:1]]
    return {size: tensors[name].shape[axis] for size, name, axis in places if name in tensors}


def _checkpoint(source: Any, label: str = "the given dict") -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    return read_checkpoint(source) if isinstance(source, str | PathLike) else opened(source, label)


def _map_to_deploy_form(checkpoint: Checkpoint, target: Target, **options: Any) -> Mapped:
    """Map a checkpoint of either form to a re-parameterized model."""
    try:
        return map_file(checkpoint, target, **{**options, "strict": True})
    except CheckpointError:
        if checkpoint.deploy:
            raise
    inner: Any = target.module
    dtype = next(inner.parameters()).dtype
    twin = type(inner)(**inner.arguments).to(dtype).eval()  # in training form
    mapped = map_file(checkpoint, Target(twin), **options)
    twin.follow(mapped.followed)
    twin.load_state_dict(mapped.tensors, strict=False)
    reparameterize(twin, inplace=True, verify=False)
    own = inner.state_dict().keys()
    merged = {key: value for key, value in twin.state_dict().items() if key in own}
    return replace(mapped, tensors=merged)
