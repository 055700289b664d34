"""Bringing a checkpoint's keys and shapes into a model's own: prefixes, layouts, completeness."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from backbones.errors import CheckpointError
from backbones.weights.prefixes import overlap, prefixes, without_inner_words
from backbones.weights.target import Layout, Target
from backbones.weights.untrusted import Checkpoint
from backbones.weights.values import check_values

__all__ = ["OWN_LAYOUT", "Mapped", "Match", "map_checkpoint", "map_file"]

OWN_LAYOUT = "backbones"
# torch.optim.swa_utils.AveragedModel counts its updates in the state dict.
_BOOKKEEPING = "n_averaged"
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|averaged?|average_model|swa)(?:[._]|$)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Match:
    """Where in a checkpoint a model was found, and what became of the rest.

    Entries are listed by their names in the model's layout.
    """

    layout: str
    """The layout the keys were in; ``backbones`` is the model's own."""
    wrapper: str | None = None
    """The dicts around the state dict, such as ``model_ema``."""
    prefix: str = ""
    """What was taken off the keys, such as ``module.``."""
    inner: tuple[str, ...] = ()
    """Words taken out of the middle of the keys, such as ``_fsdp_wrapped_module``."""
    dropped: tuple[str, ...] = ()
    """Entries the model computes itself or was built without (auxiliary heads)."""
    ignored: tuple[str, ...] = ()
    """Entries of parts the model has not, what lies outside of it, and what is no tensor."""
    missing: tuple[str, ...] = ()
    """Entries of the model that kept their values (only with ``strict=False``)."""
    unexpected: tuple[str, ...] = ()
    """Entries without a place in the model (only with ``strict=False``)."""
    passed_over: tuple[str, ...] = ()
    """Where all that the model needs lies as well, such as the raw weights beside averages."""


@dataclass(frozen=True, kw_only=True)
class Mapped(Match):
    """A checkpoint in a model's own names and shapes."""

    tensors: dict[str, Tensor]
    followed: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that the checkpoint shows and the model has otherwise, to be followed first."""


@dataclass
class _Attempt:
    """One reading of the checkpoint: a prefix and a layout, and how well it fits."""

    prefix: str
    inner: tuple[str, ...]
    layout: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    error: Exception | None = None

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched or self.error)

    @property
    def rank(self) -> tuple[int, int, bool, int]:
        fits, close = len(self.tensors), len(self.mismatched)
        return fits, close, self.error is None, -len(self.unexpected)


def map_file(checkpoint: Checkpoint, target: Target, **options: Any) -> Mapped:
    """Map what was read of a file, with the options and errors of `map_checkpoint`.

    What lies beside the state dict that was opened is taken where the model fits there only.
    """
    target.require_form(checkpoint)
    target.require_arguments(checkpoint)
    tensors, beside = checkpoint.tensors, checkpoint.beside
    place: dict[str, Any] = {"wrapper": checkpoint.wrapper}
    if beside and 2 * overlap(tensors, target.present) < overlap(beside, target.present):
        tensors, place = beside, {}
    elif checkpoint.passed_over:
        place["passed_over"] = checkpoint.passed_over
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise CheckpointError(f"{checkpoint.source}: entry {key[:80]!r} has no values (meta)")
    try:
        return replace(map_checkpoint(tensors, target, **options), **place)
    except CheckpointError as error:
        raise type(error)(f"{checkpoint.source}: {error}") from error


def map_checkpoint(
    tensors: dict[str, Tensor],
    model: nn.Module | Target,
    *,
    strict: bool = True,
    ignore_classifier: bool = False,
    any_input_channels: Sequence[str] = (),
) -> Mapped:
    """Rename and reshape a checkpoint's tensors to what `model` expects.

    Below each prefix where the model may lie, judged by shapes, the model's own layout is tried
    and then each of `model.layouts`. The own layout wins where it fits completely; otherwise
    exactly one must. What lies outside of the prefix is taken under its own name where the model
    needs it, and else ignored. If nothing fits, words that wrappers of inner modules put into the
    keys are left out. Shapes may differ by dimensions of size 1. Nothing is copied or changed.

    Where several prefixes fit with different values, averaged weights (``ema``, or a ``teacher``
    beside its ``student``) are preferred.

    Args:
        tensors: the bare state dict, any prefix, any of the model's layouts.
        model: the receiver; its parameters may be on the meta device.
        strict: False tolerates missing and unexpected entries, never wrong shapes, and not a
            checkpoint of which nothing fits.
        ignore_classifier: take classifier entries as they are, of any shape, or absent.
        any_input_channels: names of convolution weights whose second dimension may differ.

    Raises:
        CheckpointError: nothing fits, or several layouts or prefixes do; a value is not finite or
            of the wrong kind. The message names the closest layout and the first few differences.
    """
    target = (model if isinstance(model, Target) else Target(model)).following(tensors)
    best: _Attempt | None = None
    complete: list[_Attempt] = []
    for renamed, inner in chain([(tensors, ())], without_inner_words(tensors, target.present)):
        for prefix in prefixes(renamed, target.present):
            if any(prefix.startswith(one.prefix) for one in complete):
                continue
            for attempt in _readings(
                renamed, prefix, inner, target, ignore_classifier, any_input_channels
            ):
                if best is None or attempt.rank > best.rank:
                    best = attempt
                if attempt.complete:
                    complete.append(attempt)
                    break
        if complete:
            return _finish(_preferred(_distinct(complete), target), target)
    if best is None:
        raise CheckpointError(f"holds nothing that could fit {target.name}")
    if strict or best.error or best.mismatched or not best.tensors:
        shapes_fit = not best.mismatched and overlap(tensors, target.present)
        raise CheckpointError(_explain(best, target, strict, shapes_fit)) from best.error
    return _finish(best, target)


def _readings(
    tensors: dict[str, Tensor],
    prefix: str,
    inner: tuple[str, ...],
    target: Target,
    *options: Any,
) -> Iterator[_Attempt]:
    """Yield the best reading below a prefix: with what lies outside of it, then without."""
    below = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    outside = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}
    for kept in (outside, {}) if outside else ({},):
        kept = {key: tensor for key, tensor in kept.items() if key not in below}
        attempts: list[_Attempt] = []
        for name, layout in ((OWN_LAYOUT, ()), *target.layouts.items()):
            attempt = _Attempt(prefix, inner, name)
            attempt.ignored += [key for key in outside if key not in kept]
            _try(attempt, {**below, **kept}, layout, target, set(map(id, kept.values())), *options)
            attempts.append(attempt)
            if attempt.complete and name == OWN_LAYOUT:
                break
        complete = _distinct([attempt for attempt in attempts if attempt.complete])
        if len(complete) > 1:
            names = ", ".join(attempt.layout for attempt in complete)
            raise CheckpointError(
                f"fits {target.name} in several layouts ({names}) with different results; "
                "rename its keys to the model's own (model.state_dict()) and load that"
            )
        yield complete[0] if complete else max(attempts, key=lambda attempt: attempt.rank)


def _try(
    attempt: _Attempt,
    tensors: dict[str, Tensor],
    layout: Layout,
    target: Target,
    outside: set[int],
    ignore_classifier: bool,
    any_input_channels: Sequence[str],
) -> None:
    """Fill in `attempt`: rename, drop what is not needed, let the model complete, compare.

    Of the tensors whose identity is in `outside`, those that do not fit are ignored.
    """
    try:
        if callable(layout):
            renamed = layout(dict(tensors), target.module)
        else:
            renamed = _rename(tensors, layout, attempt)
    except Exception as error:  # a family's code on others' tensors; shown if nothing fits
        attempt.error = error
        return
    needed: dict[str, Tensor] = {}
    for key, tensor in renamed.items():
        counter = key == _BOOKKEEPING and key not in target.present
        if counter or target.is_derived(key) or target.is_absent_auxiliary(key):
            attempt.dropped.append(key)
        else:
            needed[key] = tensor
    if any(key in target.present for key in needed):
        try:
            needed = target.complete(needed)
        except Exception as error:  # likewise
            attempt.error = error
    for key, tensor in needed.items():
        if key in target.present:
            own = target.present[key].shape
            free = ignore_classifier and target.is_classifier(key)
            free |= target.is_resizable(key) and tensor.shape[:-1] == own[:-1]
            fitted = tensor if free else _fit(tensor, own, key in any_input_channels)
            if fitted is None and id(tensor) in outside:
                attempt.ignored.append(key)
                attempt.missing.append(key)
            elif fitted is None:
                attempt.mismatched.append(
                    f"{key!r} is {tuple(tensor.shape)}, the model has {tuple(own)}"
                )
            else:
                attempt.tensors[key] = fitted
        elif target.is_absent_part(key) or id(tensor) in outside:
            attempt.ignored.append(key)
        else:
            attempt.unexpected.append(key)
    attempt.missing += [
        key
        for key in target.present
        if key not in needed
        and not key.endswith("num_batches_tracked")
        and not target.is_derived(key)
        and not (ignore_classifier and target.is_classifier(key))
    ]


def _rename(
    tensors: dict[str, Tensor], rules: Sequence[tuple[str, str | None]], attempt: _Attempt
) -> dict[str, Tensor]:
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        new = key
        for pattern, replacement in compiled:
            if replacement is not None:
                new = pattern.sub(replacement, new)
            elif pattern.search(new):
                attempt.dropped.append(key)
                break
        else:
            if new in renamed:
                attempt.mismatched.append(f"{new!r} comes twice, also as {key!r}")
            renamed[new] = tensor
    return renamed


def _fit(tensor: Tensor, shape: torch.Size, any_channels: bool) -> Tensor | None:
    """Return `tensor` in `shape`, or None where more than dimensions of size 1 differ."""
    if tensor.shape == shape:
        return tensor
    by_output = (shape[:1], len(shape), shape[2:])
    if any_channels and (tensor.shape[:1], tensor.ndim, tensor.shape[2:]) == by_output:
        return tensor
    if [n for n in tensor.shape if n != 1] == [n for n in shape if n != 1]:
        return tensor.reshape(shape)
    return None


def _distinct(attempts: list[_Attempt]) -> list[_Attempt]:
    """Leave out attempts that give the same tensors as an earlier one."""
    result: list[_Attempt] = []
    for attempt in attempts:
        if not any(_same(attempt.tensors, other.tensors) for other in result):
            result.append(attempt)
    return result


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value is other[key] or (not value.is_meta and torch.equal(value, other[key]))
        for key, value in one.items()
    )


def _preferred(complete: list[_Attempt], target: Target) -> _Attempt:
    """Return the one reading that fits, or the averaged weights among several."""
    if len(complete) == 1:
        return complete[0]
    prefixes = [attempt.prefix for attempt in complete]
    of_students = any("student" in prefix for prefix in prefixes)
    averaged = [
        attempt
        for attempt in complete
        if _AVERAGED.search(attempt.prefix) or (of_students and "teacher" in attempt.prefix)
    ]
    if len(averaged) != 1:
        raise CheckpointError(
            f"holds several sets of weights that fit {target.name}, below {', '.join(prefixes)};"
            f" pass only the entries of one, such as those that begin with {prefixes[0]!r}"
        )
    averaged[0].passed_over += [prefix for prefix in prefixes if prefix != averaged[0].prefix]
    return averaged[0]


def _finish(attempt: _Attempt, target: Target) -> Mapped:
    check_values(attempt.tensors, target.present)
    names = [one.name for one in fields(Mapped)]
    facts: dict[str, Any] = {k: v for k, v in vars(attempt).items() if k in names}
    facts |= {k: tuple(v) for k, v in facts.items() if isinstance(v, list)}
    return Mapped(**facts, followed=target.followed)


def _explain(attempt: _Attempt, target: Target, strict: bool, shapes_fit: int) -> str:
    """Say how far the best reading goes; `shapes_fit` entries have their shape in the file."""
    count = len(target.present)
    prefix = f" without the prefix {attempt.prefix!r}" if attempt.prefix else ""
    prefix += f" and {', '.join(attempt.inner)}" if attempt.inner else ""
    parts = [
        f"does not fit {target.name}; closest is the layout {attempt.layout!r}{prefix}, where "
        + f"{len(attempt.tensors)} of {count} entries fit"
    ]
    if attempt.error:
        parts.append(f"{type(attempt.error).__name__}: {attempt.error}")
    parts += _listed("missing", map(repr, attempt.missing))
    parts += _listed("unexpected", map(repr, attempt.unexpected))
    parts += _listed("do not fit", attempt.mismatched)
    partial = ", or pass strict=False to load what fits" if strict and attempt.tensors else ""
    if target.deployed:
        parts.append(
            "the model is re-parameterized and takes only files saved in that form; "
            "load the checkpoint before reparameterize()"
        )
    elif attempt.mismatched and all(
        target.is_classifier(line.split("'")[1]) for line in attempt.mismatched
    ):
        parts.append(
            "only the classifier differs; create the model with the file's num_classes, or for a"
            " new classifier with checkpoint_path=... and yours"
        )
    elif attempt.missing and all(map(target.is_classifier, attempt.missing)):
        parts.append(
            "the file has no classifier; create the model with num_classes=0, or for a new"
            f" classifier with checkpoint_path=... and num_classes{partial}"
        )
    elif attempt.mismatched:
        parts.append("create the variant that the file was made for")
    elif shapes_fit >= 0.9 * count > len(attempt.tensors):
        parts.append(
            "its tensors have the shapes of this model, under names of no known layout; rename them"
            f" to those of model.state_dict(){partial}"
        )
    elif attempt.missing and not attempt.unexpected and attempt.tensors:
        parts.append(f"the file is incomplete, or of a smaller variant{partial}")
    else:
        parts.append(f"create the variant that the file was made for{partial}")
    return "; ".join(parts)


def _listed(what: str, entries: Iterable[str]) -> Iterator[str]:
    names = list(entries)
    if names:
        more = ", ..." if len(names) > 4 else ""
        yield f"{what} ({len(names)}): {', '.join(names[:4])}{more}"
