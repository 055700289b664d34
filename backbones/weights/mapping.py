"""Bringing a checkpoint's keys and shapes into a model's own: prefixes, layouts, completeness."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from backbones.errors import CheckpointError
from backbones.weights.prefixes import prefixes, strip
from backbones.weights.target import Layout, Target
from backbones.weights.values import check_values

__all__ = ["OWN_LAYOUT", "Mapped", "map_checkpoint"]

OWN_LAYOUT = "backbones"
# torch.optim.swa_utils.AveragedModel counts its updates in the state dict.
_BOOKKEEPING = "n_averaged"


@dataclass(frozen=True)
class Mapped:
    """A checkpoint in a model's own names and shapes, and what became of the rest."""

    tensors: dict[str, Tensor]
    layout: str
    """The layout the keys were in; ``backbones`` is the model's own."""
    prefix: str
    """The prefix taken off the keys, such as ``module.``; empty for none."""
    dropped: tuple[str, ...] = ()
    """Entries the model computes itself or was built without (auxiliary heads)."""
    ignored: tuple[str, ...] = ()
    """Entries of parts the model has not: pruned stages, classifier, the rest of a detector."""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


@dataclass
class _Attempt:
    """One reading of the checkpoint: a prefix and a layout, and how well it fits."""

    prefix: str
    layout: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    error: Exception | None = None

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched or self.error)

    @property
    def rank(self) -> tuple[int, int, bool, int]:
        fits, close = len(self.tensors), len(self.mismatched)
        return fits, close, self.error is None, -len(self.unexpected)


def map_checkpoint(
    tensors: dict[str, Tensor],
    model: nn.Module,
    *,
    strict: bool = True,
    ignore_classifier: bool = False,
    any_input_channels: Sequence[str] = (),
) -> Mapped:
    """Rename and reshape a checkpoint's tensors to what `model` expects.

    For each prefix that occurs in the keys (none first) the model's own layout is tried and then
    each of `model.layouts`. The own layout wins where it fits completely; otherwise exactly one
    must. Shapes may differ by dimensions of size 1. Nothing is copied or changed.

    Args:
        tensors: the bare state dict, any prefix, any of the model's layouts.
        model: the receiver; its parameters may be on the meta device.
        strict: False tolerates missing and unexpected entries, never wrong shapes, and not a
            checkpoint of which nothing fits.
        ignore_classifier: take classifier entries as they are, of any shape, or absent.
        any_input_channels: names of convolution weights whose second dimension may differ.

    Raises:
        CheckpointError: nothing fits or several layouts do; a value is not finite or of the wrong
            kind. The message names the closest layout and the first few differences.
    """
    target = Target(model)
    best: _Attempt | None = None
    for prefix in prefixes(tensors):
        stripped, outside = strip(tensors, prefix)
        if stripped is None:
            continue
        attempts: list[_Attempt] = []
        for name, layout in ((OWN_LAYOUT, ()), *target.layouts.items()):
            attempt = _Attempt(prefix, name, ignored=list(outside))
            _try(attempt, stripped, layout, target, ignore_classifier, any_input_channels)
            attempts.append(attempt)
            if best is None or attempt.rank > best.rank:
                best = attempt
            if attempt.complete and name == OWN_LAYOUT:
                break
        complete = _distinct([attempt for attempt in attempts if attempt.complete])
        if len(complete) > 1:
            names = ", ".join(attempt.layout for attempt in complete)
            raise CheckpointError(
                f"fits {target.name} in several layouts ({names}) with different results; "
                "rename its keys to the model's own (model.state_dict()) and load that"
            )
        if complete:
            return _finish(complete[0], target)
    if best is None:
        raise CheckpointError(f"holds nothing that could fit {target.name}")
    if strict or best.error or best.mismatched or not best.tensors:
        raise CheckpointError(_explain(best, target, strict)) from best.error
    return _finish(best, target)


def _try(
    attempt: _Attempt,
    tensors: dict[str, Tensor],
    layout: Layout,
    target: Target,
    ignore_classifier: bool,
    any_input_channels: Sequence[str],
) -> None:
    """Fill in `attempt`: rename, drop what is not needed, let the model complete, compare."""
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
            if fitted is None:
                attempt.mismatched.append(
                    f"{key!r} is {tuple(tensor.shape)}, the model has {tuple(own)}"
                )
            else:
                attempt.tensors[key] = fitted
        elif target.is_absent_part(key):
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


def _finish(attempt: _Attempt, target: Target) -> Mapped:
    check_values(attempt.tensors, target.present)
    rest = (attempt.dropped, attempt.ignored, attempt.missing, attempt.unexpected)
    return Mapped(attempt.tensors, attempt.layout, attempt.prefix, *map(tuple, rest))


def _explain(attempt: _Attempt, target: Target, strict: bool) -> str:
    prefix = f" without the prefix {attempt.prefix!r}" if attempt.prefix else ""
    parts = [
        f"does not fit {target.name}; closest is the layout {attempt.layout!r}{prefix}, where "
        + f"{len(attempt.tensors)} of {len(target.present)} entries fit"
    ]
    if attempt.error:
        parts.append(f"{type(attempt.error).__name__}: {attempt.error}")
    parts += _listed("missing", map(repr, attempt.missing))
    parts += _listed("unexpected", map(repr, attempt.unexpected))
    parts += _listed("do not fit", attempt.mismatched)
    if target.deployed:
        parts.append(
            "the model is re-parameterized and takes only files saved in that form; "
            "load the checkpoint before reparameterize()"
        )
    elif attempt.mismatched and all(
        target.is_classifier(line.split("'")[1]) for line in attempt.mismatched
    ):
        parts.append("only the classifier differs; create the model with the file's num_classes")
    else:
        parts.append("create the variant that the file was made for")
        if strict and attempt.tensors and not attempt.mismatched:
            parts[-1] += ", or pass strict=False to load what fits"
    return "; ".join(parts)


def _listed(what: str, entries: Iterable[str]) -> Iterator[str]:
    names = list(entries)
    if names:
        more = ", ..." if len(names) > 4 else ""
        yield f"{what} ({len(names)}): {', '.join(names[:4])}{more}"
