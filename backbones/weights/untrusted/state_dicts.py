"""Finding the state dict inside whatever a training script saved."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from backbones.errors import CheckpointError

__all__ = ["WRAPPERS", "unwrap", "unwrap_all"]

# timm's preference: averaged weights before the raw ones, as published accuracies are of those.
_AVERAGED = ("state_dict_ema", "model_ema", "ema")
WRAPPERS = (*_AVERAGED, "state_dict", "model", "module")
_MAX_DEPTH = 4
_MAX_KEY_LENGTH = 1024


def unwrap(obj: Any) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors of a checkpoint object and the wrapper they were found under.

    The first of `state_dict_ema`, `model_ema`, `ema`, `state_dict`, `model`, `module` that holds
    tensors is opened, wrappers within wrappers too; without any, the object itself is the state
    dict. An averaged entry keyed by decay, ``{0.9998: state_dict}``, is opened where it has one
    decay, and after `state_dict`: CPUBone's `evalmodel.pt` keeps its averaged weights, with
    recomputed BatchNorm statistics, under `state_dict` and the raw averages under `ema`.

    Raises:
        CheckpointError: no tensors are found, several decays leave a choice, or an entry is no
            plain dense tensor.
    """
    tensors, wrapper, _ = unwrap_all(obj)
    return tensors, wrapper


def unwrap_all(obj: Any) -> tuple[dict[str, Tensor], str | None, tuple[str, ...]]:
    """Like `unwrap`, and also return the names of entries beside the tensors that are none."""
    wrappers: list[str] = []
    while True:
        if not isinstance(obj, Mapping):
            raise CheckpointError(
                f"holds a {type(obj).__name__} where a state dict was expected; "
                "save the model's state_dict() and load that"
            )
        found = _wrapper_of(obj) if len(wrappers) < _MAX_DEPTH else None
        if found is None:
            break
        name, obj = found
        wrappers.append(name)
    tensors: dict[str, Tensor] = {}
    others: list[str] = []
    for key, value in obj.items():
        if not isinstance(value, Tensor):
            others.append(_shown(key))
        elif not isinstance(key, str) or len(key) > _MAX_KEY_LENGTH:
            raise CheckpointError(f"the tensor key {_shown(key)!r} is no name of a parameter")
        else:
            tensors[key] = _plain(key, value)
    if not tensors:
        raise CheckpointError(
            f"holds no tensors (its keys: {', '.join(others[:8]) or 'none'}); expected a state "
            f"dict, bare or under one of {', '.join(WRAPPERS)}"
        )
    return tensors, ".".join(wrappers) or None, tuple(others)


def _wrapper_of(obj: Mapping[Any, Any]) -> tuple[str, Any] | None:
    """Return name and content of the wrapper to open, None where `obj` is the state dict."""
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
            return f"{name}[{decays[0]}]", content[decays[0]]
        if _holds_tensors(content):
            return name, content
    return None


def _is_by_decay(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(key, float) and _holds_tensors(value) for key, value in content.items())


def _holds_tensors(obj: Any) -> bool:
    """Whether there are tensors in `obj`, at most `_MAX_DEPTH` mappings further in.

    Each mapping of a level is looked into once: a few of them that hold each other a thousand times
    over make more paths than can be walked.
    """
    level = [obj]
    for _ in range(_MAX_DEPTH + 2):
        if any(isinstance(value, Tensor) for value in level):
            return True
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
