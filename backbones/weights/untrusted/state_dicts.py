"""Finding the state dict inside whatever a training script saved."""

from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from backbones.errors import CheckpointError

__all__ = ["names_in", "open_content", "unwrap", "unwrap_all"]

# timm's preference: averaged weights before the raw ones, as published accuracies are of those.
_AVERAGED = ("state_dict_ema", "model_ema", "ema")
WRAPPERS = (*_AVERAGED, "state_dict", "model", "module")
# Where training scripts (PyTorch's examples, torchvision's, timm's, Lightning) name the model.
_SETTINGS = ("args", "hyper_parameters", "hparams", "config", "cfg")
_NAME_KEYS = ("arch", "model", "model_name", "architecture", "backbone")
_MAX_DEPTH = 4
_MAX_KEY_LENGTH = 1024


def unwrap(obj: Any) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors of a checkpoint object and the wrapper they were found under.

    The first of `state_dict_ema`, `model_ema`, `ema`, `state_dict`, `model`, `module` that holds
    tensors is opened, or else the one mapping that does, wrappers within wrappers too; without any,
    the object itself is the state dict. Of several mappings of other names all tensors are
    returned, with the names of the mappings before their own.

    An averaged entry keyed by decay, ``{0.9998: state_dict}``, is opened where it has one decay,
    and after `state_dict`: CPUBone's `evalmodel.pt` keeps its averaged weights, with recomputed
    BatchNorm statistics, under `state_dict` and the raw averages under `ema`.

    Raises:
        CheckpointError: no tensors are found, several decays leave a choice, or an entry is no
            plain dense tensor.
    """
    tensors, wrapper, _ = unwrap_all(obj)
    return tensors, wrapper


def unwrap_all(obj: Any) -> tuple[dict[str, Tensor], str | None, tuple[str, ...]]:
    """Like `unwrap`, and also return the names of entries beside the tensors that are none."""
    return open_content(obj)[:3]


def open_content(
    obj: Any,
) -> tuple[dict[str, Tensor], str | None, tuple[str, ...], dict[str, Tensor]]:
    """Like `unwrap_all`, and also return the tensors of mappings that were not opened.

    These, without the state of optimizers, have the names of their mappings before their own:
    ``student.stem.0.weight``.
    """
    wrappers: list[str] = []
    beside: dict[str, Tensor] = {}
    while True:
        if not isinstance(obj, Mapping):
            raise CheckpointError(
                f"holds a {type(obj).__name__} where a state dict was expected; "
                "save the model's state_dict() and load that"
            )
        found = _wrapper_of(obj) if len(wrappers) < _MAX_DEPTH else None
        _flatten({k: v for k, v in obj.items() if not found or v is not found[1]}, beside)
        if found is None:
            break
        obj = found[2]
        wrappers.append(found[0])
    tensors: dict[str, Tensor] = {}
    others: list[str] = []
    for key, value in obj.items():
        if not isinstance(value, Tensor):
            others.append(_shown(key))
        elif not isinstance(key, str) or len(key) > _MAX_KEY_LENGTH:
            raise CheckpointError(f"the tensor key {_shown(key)!r} is no name of a parameter")
        else:
            tensors[key] = _plain(key, value)
    if not tensors and not beside:
        raise CheckpointError(
            f"holds no tensors (its keys: {', '.join(others[:8]) or 'none'}); expected a state "
            "dict, bare or wrapped in dicts"
        )
    if not tensors:
        tensors, beside = beside, {}
    return tensors, ".".join(wrappers) or None, tuple(others), beside


def names_in(content: Any) -> tuple[str, ...]:
    """Return what the file of a training script calls its model, the likeliest name first."""
    names: dict[str, None] = {}
    if isinstance(content, Mapping):
        for holder in (content, *map(content.get, _SETTINGS)):
            entries: Any = vars(holder) if isinstance(holder, Namespace) else holder
            for key in _NAME_KEYS if isinstance(entries, Mapping) else ():
                value = entries.get(key)
                if isinstance(value, str) and value.isprintable() and len(value) < 200:
                    names[value] = None
    return tuple(names)


def _wrapper_of(obj: Mapping[Any, Any]) -> tuple[str, Any, Any] | None:
    """Return name, mapping and content (one average by decay) of the wrapper to open, if any."""
    if any(isinstance(obj.get(name), nn.Module) for name in WRAPPERS):
        raise CheckpointError("holds a whole model object; save its state_dict() and load that")
    candidates = {n: obj[n] for n in WRAPPERS if isinstance(obj.get(n), Mapping) and obj[n]}
    by_decay = [n for n in _AVERAGED if n in candidates and _is_by_decay(candidates[n])]
    order = [n for n in candidates if n not in by_decay]
    raw = sum(name in _AVERAGED for name in order)
    at = order.index("state_dict") + 1 if "state_dict" in order else raw
    for name in (*order[:at], *by_decay, *order[at:]):
        content = candidates[name]
        if name in by_decay:
            decays = list(content)
            if len(decays) > 1:
                raise CheckpointError(
                    f"{name!r} holds averages of several decays ({', '.join(map(str, decays[:8]))})"
                    f"; load the one you want: load_checkpoint(model, checkpoint[{name!r}][decay])"
                )
            return f"{name}[{decays[0]}]", content, content[decays[0]]
        if _holds_tensors(content):
            return name, content, content
    if any(isinstance(value, Tensor) for value in obj.values()):
        return None
    others = [k for k, v in obj.items() if isinstance(v, Mapping) and not _is_of_optimizer(k, v)]
    others = [key for key in others if _holds_tensors(obj[key])]
    if len(others) != 1:
        return None  # what fits the model is found by its names
    return _shown(others[0]), obj[others[0]], obj[others[0]]


def _flatten(obj: Mapping[Any, Any], tensors: dict[str, Tensor]) -> None:
    """Add the tensors of the mappings in `obj` to `tensors`; each mapping is looked into once."""
    seen: set[int] = set()
    level: list[tuple[str, Mapping[Any, Any]]] = [("", obj)]
    for depth in range(_MAX_DEPTH):
        inner: list[tuple[str, Mapping[Any, Any]]] = []
        for prefix, content in level:
            for key, value in content.items():
                if not isinstance(key, str | int | float) or _is_of_optimizer(key, value):
                    continue
                if len(prefix) + len(str(key)) > _MAX_KEY_LENGTH:
                    continue
                if isinstance(value, Mapping) and id(value) not in seen:
                    seen.add(id(value))
                    inner.append((f"{prefix}{key}.", value))
                elif isinstance(value, Tensor) and depth:
                    with suppress(CheckpointError):  # a sparse tensor, say: the model lacks it
                        tensors.setdefault(f"{prefix}{key}", _plain("", value))
        level = inner


def _is_of_optimizer(key: Any, content: Any) -> bool:
    """Whether an entry is an optimizer's state, which has tensors of a model's names and shapes."""
    return isinstance(content, Mapping) and ("param_groups" in content or "optim" in str(key)[:80])


def _is_by_decay(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(key, float) and _holds_tensors(value) for key, value in content.items())


def _holds_tensors(obj: Any) -> bool:
    """Whether there are tensors in `obj`, at most `_MAX_DEPTH` mappings further in."""
    level = [obj]
    for _ in range(_MAX_DEPTH + 2):
        if any(isinstance(value, Tensor) for value in level):
            return True
        # Each once: a few that hold each other a thousand times make more paths than can be walked.
        mappings = {id(m): m for m in level if isinstance(m, Mapping)}
        level = [value for mapping in mappings.values() for value in mapping.values()]
    return False


def _shown(key: Any) -> str:
    """Return a key of the file for messages: short, and nothing a terminal would obey."""
    text = str(key)[:80]
    return text if text.isprintable() else repr(text)


def _plain(key: str, tensor: Tensor) -> Tensor:
    """Return `tensor` as a bare dense tensor, without subclass, gradient or attached attributes."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise CheckpointError(
            f"{key!r} is a sparse, quantized or nested tensor; store it dense, in floating point"
        )
    return tensor.detach().as_subclass(Tensor)
